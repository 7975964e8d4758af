#ifndef ADAATTN_KERNELS_CUDA_STREAM_H_
#define ADAATTN_KERNELS_CUDA_STREAM_H_

// Owners of streams and instantiated graphs.

#include <cuda_runtime_api.h>

#include <utility>

#include "absl/status/status.h"
#include "kernels/cuda/status.h"

namespace adaattn {

class Stream {
 public:
  Stream() = default;
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream() {
    if (stream_ != nullptr) (void)cudaStreamDestroy(stream_);
  }
  absl::Status Create() {
    return FromCuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking),
                    "cudaStreamCreateWithFlags");
  }
  cudaStream_t get() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

class GraphExec {
 public:
  GraphExec() = default;
  GraphExec(const GraphExec&) = delete;
  GraphExec& operator=(const GraphExec&) = delete;
  ~GraphExec() { Reset(nullptr); }
  void Reset(cudaGraphExec_t graph) {
    if (graph_ != nullptr) (void)cudaGraphExecDestroy(graph_);
    graph_ = graph;
  }
  cudaGraphExec_t get() const { return graph_; }

 private:
  cudaGraphExec_t graph_ = nullptr;
};

// Everything that `enqueue(stream)` puts on the stream, as one graph, ready to launch.
template <class Enqueue>
absl::Status Capture(cudaStream_t stream, const Enqueue& enqueue, GraphExec* exec) {
  ADAATTN_RETURN_IF_CUDA_ERROR(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed));
  const absl::Status enqueued = enqueue(stream);
  cudaGraph_t graph = nullptr;
  // Ends the capture whatever came of it, or the stream stays unusable.
  const absl::Status ended = FromCuda(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
  cudaGraphExec_t made = nullptr;
  absl::Status status = enqueued.ok() ? ended : enqueued;
  if (status.ok()) {
    status = FromCuda(cudaGraphInstantiate(&made, graph, 0), "cudaGraphInstantiate");
  }
  if (graph != nullptr) (void)cudaGraphDestroy(graph);
  if (!status.ok()) return status;
  exec->Reset(made);
  return FromCuda(cudaGraphUpload(made, stream), "cudaGraphUpload");
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_STREAM_H_
