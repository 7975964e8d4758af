#ifndef ADAATTN_KERNELS_CUDA_PROGRESSIVE_CONCLUDE_CUH_
#define ADAATTN_KERNELS_CUDA_PROGRESSIVE_CONCLUDE_CUH_

// Conclude: select, attend and merge in one launch, for steps of few heads, whose launches would
// each take some microseconds for little work.
// Each of the n CTAs of a cluster takes every n-th sealed page of a (sequence, kv head), from the
// decision to the sums of values: where pages of much weight lie together they all have some. What
// the launches leave for one another stays in shared memory. Each CTA sends its sums of a column to
// the one that adds them up, which waits for nothing else.
// grid (ConcludeCtas, num_kv_heads, num_sequences), a cluster a head

#include <cstddef>

#include "kernels/cuda/async_copy.cuh"
#include "kernels/cuda/conclude_parts.h"
#include "kernels/cuda/progressive_merge.cuh"
#include "kernels/cuda/row_cluster.cuh"

namespace adaattn {

// Bytes of rings: what the rest of ConcludeShared leaves of what a CTA may have.
template <class Traits>
constexpr int ConcludeRoom() {
  if (Traits::kHeadDim > 128) return 112 * 1024;
  return Traits::kColumns == kFewColumns ? 148 * 1024 : 120 * 1024;
}

// What pages add up to in a column.
template <int kD>
struct alignas(16) ConcludePart {
  // In place of kSkipped in the end all of the output's values.
  float vectors[kNumChunkVectors][kD];
  ChunkState state;
  float mass, top;  // of those values; both are relative to 2^top beside L
};

template <class Traits>
struct ConcludeShared : AttendRings<Traits, ConcludeRoom<Traits>(), kConcludePages> {
  static constexpr int kColumns = Traits::kColumns;
  // A slot's sums of values; in the room of its ring once all slots are through. Rows are 4 banks
  // apart, for the lanes that store a channel of different columns.
  struct SlotSums {
    float out[kColumns][Traits::kHeadDim + 4];
  };
  static_assert(sizeof(SlotSums) <= ConcludeShared::kRingBytes, "in the room of the ring");
  SelectShared<Traits> select;
  ConcludePart<Traits::kHeadDim> part[kColumns];  // of the CTA's pages
  // Those of the CTA's own columns that each CTA of the cluster has sent, column after column.
  ConcludePart<Traits::kHeadDim> sent[ConcludeParts(kColumns)];
  ConcludePart<Traits::kHeadDim> total;  // of the head's pages, of one column
  float slot_reference[ConcludeShared::kSlots][kTileColumns];
  float slot_mass[ConcludeShared::kSlots][kTileColumns];
  float lse[kTileColumns];
  int columns;                   // of the sequence
  float2 figures[kTileColumns];  // of the head's columns, in the first CTA
  // Barriers of what is sent: to `sent`, to `figures`.
  alignas(8) uint64_t sums_sent;
  uint64_t figures_sent;

  __device__ __forceinline__ SlotSums& SumsOf(int slot) {
    return *reinterpret_cast<SlotSums*>(this->room[slot]);
  }
};

// What one CTA does of a head.
template <class Traits>
struct HeadConcluder {
  using Shared = ConcludeShared<Traits>;
  using Attender = PageAttender<Traits, Shared>;
  using Decider = PageDecider<Traits>;
  using Part = ConcludePart<Traits::kHeadDim>;
  static constexpr int kD = Traits::kHeadDim, kColumns = Traits::kColumns;
  static constexpr int kThreads = Shared::kThreads, kPartFloats = sizeof(Part) / sizeof(float);
  static_assert(kThreads == 2 * kSelectThreads, "as many others as select");
  const ProgressiveArgs& p;
  Shared& shared;
  const ProgressiveSequence& from;
  int listed = 0;  // of the CTA's pages, attended

  __device__ __forceinline__ HeadConcluder(const ProgressiveArgs& args, Shared& room)
      : p(args), shared(room), from(args.sequences[blockIdx.z]) {
    if (threadIdx.x != kSelectThreads) return;  // those that select have more to do
    const int columns = args.group.size * from.q_len, ctas = cluster().ctas;
    shared.columns = columns;
    // Of the columns rank, rank + ctas, ..., from each CTA.
    int parts = 0;
    for (int column = cluster().rank; column < columns; column += ctas) parts += ctas;
    Expect(&shared.sums_sent, parts * static_cast<int>(sizeof(Part)));
    Expect(&shared.figures_sent, columns * static_cast<int>(sizeof(float2)));
    FenceBarrierInit();
  }
  static __device__ __forceinline__ void Expect(uint64_t* barrier, int bytes) {
    InitBarrier(SharedAddress(barrier), 1);
    ArriveExpectBytes(SharedAddress(barrier), static_cast<uint32_t>(bytes));
  }

  // Not members, which would take registers.
  __device__ __forceinline__ int sequence() const { return blockIdx.z; }
  __device__ __forceinline__ int head() const { return blockIdx.y; }
  __device__ __forceinline__ int head_index() const {
    return sequence() * p.shape.num_kv_heads + head();
  }
  __device__ __forceinline__ RowCluster cluster() const { return RowCluster(); }
  __device__ __forceinline__ int columns() const { return shared.columns; }  // after a barrier

  __device__ __forceinline__ bool Selects() const { return threadIdx.x < kSelectThreads; }
  // The CTA has pages rank, rank + ctas, ...: so many.
  __device__ __forceinline__ int pages() const {
    // Halves are no integers: rounding is far from them.
    const float left = static_cast<float>(from.num_sealed - cluster().rank) - 0.5f;
    return __float2int_rd(__fdividef(left, static_cast<float>(cluster().ctas))) + 1;
  }
  // Those from number `begin` of them on.
  __device__ __forceinline__ ChunkPages Chunk(int begin) const {
    return ChunkPages{cluster().rank + begin * cluster().ctas, cluster().ctas,
                      min(pages() - begin, kChunkPages)};
  }
  // The first page that a slot has of the list.
  __device__ __forceinline__ int Bound(int slot) const { return listed * slot / Shared::kSlots; }

  // For the launch before. By the threads that select.
  __device__ __forceinline__ void Wait() const {
    WaitForDependencies();
    NoteTime(p.stamps, kSelectStamp);
    ClearProgress(p);
  }

  // Brings what a chunk's pages are decided by, by the threads that select. Where theta is chosen
  // they do so before they wait: the launch before is the one that chooses it
  // (progressive_select.cuh).
  __device__ __forceinline__ void Load(ChunkSelector<Traits>& selector, bool first) {
    const bool chosen = ChoosesTheta(from.decision.policy);
    if (first && !chosen) Wait();
    selector.decider.Load();
    if (first && chosen) Wait();
  }

  // Meanwhile, by the others: what depends on no earlier launch, and the first time L.
  __device__ __forceinline__ void Prepare(ChunkSelector<Traits>& selector, bool first) {
    selector.Fetch(head());
    ListDepths<Traits>(p, from.decision, selector.thread, shared.select);
    if (!first) return;
    MassPart<kSelectWarps, kColumns> masses(p, from, sequence(), head(), 0, selector.thread);
    const bool chosen = ChoosesTheta(from.decision.policy);
    if (!chosen) WaitForDependencies();
    masses.Load();
    masses.Store(shared.select.lse_parts[0][selector.thread / 32]);
    if (chosen) WaitForDependencies();
  }

  // Decides a chunk's pages, by the threads that select. `lse`, `theta`: known after the first
  // chunk.
  __device__ __forceinline__ void Decide(ChunkSelector<Traits>& selector, bool first,
                                         float (&lse)[Decider::kEach], float* theta) {
    if (first) {
      if (ChoosesTheta(from.decision.policy)) *theta = p.thetas[head_index()];
      JoinLse<Traits>(shared.select, 0, lse);
      if (threadIdx.x < 4) {
#pragma unroll
        for (int i = 0; i < Decider::kEach; ++i) shared.lse[selector.decider.column(i)] = lse[i];
      }
    }
    selector.Decide(lse, *theta);
  }

  // Decides the CTA's pages, lists those that are attended and has the slots' first ones fetched;
  // while they come, adds up the means of the others and all pages' figures. All threads meet at
  // the same barriers: racecheck takes one of some of them for none.
  __device__ __forceinline__ void Select(Attender& attender) {
    const SequenceView s(from);
    float theta = ThetaOf(p, from, head_index()), lse[Decider::kEach];
    for (int begin = 0;; begin += kChunkPages) {
      // What depends on no earlier launch is for the threads that do not select.
      ChunkSelector<Traits> selector(p, from, s, sequence(), head(), 0, Chunk(begin),
                                     threadIdx.x % kSelectThreads, shared.select);
      if (Selects()) {
        Load(selector, begin == 0);
      } else {
        Prepare(selector, begin == 0);
      }
      __syncthreads();
      if (Selects()) Decide(selector, begin == 0, lse, &theta);
      __syncthreads();
      if (Selects()) {
        selector.decider.List(s, shared.select, reinterpret_cast<uint4*>(shared.page + listed));
      } else {
        selector.TakeCopies();
      }
      listed += ListLength<Traits>(shared.select).pages;
      __syncthreads();
      const bool last = begin + kChunkPages >= pages();
      if (last) Fetch(attender);
      if (Selects()) {
        selector.Summarise();
        selector.decider.Weigh(shared.select);
      } else if (selector.thread < 32) {
        CountPages<Traits>(p.decisions + head_index(), shared.select);
      }
      __syncthreads();
      SumChunk(begin);
      if (last) return;
      __syncthreads();
    }
  }

  // Adds up the figures of a chunk's pages and the means of those that are not attended.
  __device__ __forceinline__ void SumChunk(int begin) {
    if (Selects()) {
      StoreStates<Traits>(shared.select, kPartFloats,
                          reinterpret_cast<float*>(&shared.part[0].state), begin > 0);
    } else {
      const ChunkPages chunk = Chunk(begin);
      AddMeans<Traits, Shared::kWarps - kSelectWarps>(
          shared.select.means, chunk.count, chunk.HasSink(), columns(),
          static_cast<int>(threadIdx.x) / 32 - kSelectWarps, kPartFloats,
          reinterpret_cast<float*>(shared.part), begin > 0);
    }
  }

  // Starts to bring the slot's first pages.
  __device__ __forceinline__ void Fetch(Attender& attender) const {
    NoteTime(p.stamps, kAttendStamp);
    attender.streamer.next = Bound(attender.slot);
    if (attender.Fetches()) attender.streamer.Fill(Bound(attender.slot + 1));
  }

  // The slot's pages; then the CTA's sums of all slots, in their order, to who needs them.
  __device__ __forceinline__ void Attend(Attender& attender) {
    const int begin = Bound(attender.slot), end = Bound(attender.slot + 1);
    if (begin < end) attender.Enter(shared.page[begin]);
    attender.lse = shared.lse[attender.column()];
    for (int i = begin; i < end; ++i) {
      if (attender.Fetches()) attender.streamer.Fill(Here(end));
      attender.Attend(shared.page[i], [] {});
    }
    if (attender.group == 0) attender.CountBytes();
    __syncthreads();
    NoteTime(p.stamps, kMergeStamp);
    StoreSlot(attender);
    cluster().Wait();  // all have started: they may be sent to
    __syncthreads();
    SendSums();
  }

  __device__ __forceinline__ void StoreSlot(Attender& attender) {
    const int lane = attender.lane, slot = attender.slot;
    attender.JoinHalves();
    if (attender.HasColumn()) {
      shared.slot_reference[slot][lane / 4] = attender.reference;
      shared.slot_mass[slot][lane / 4] = attender.mass;
    }
    if (attender.head_index < 0) return;  // it had no page
    const int first = attender.group * Traits::kTilesPerGroup * kTileChannels + lane / 4;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int column = lane % 4 * 2 + e % 2;
      if (column >= kColumns) continue;
      float* row = shared.SumsOf(slot).out[column] + first + e / 2 * 8;
#pragma unroll
      for (int i = 0; i < Traits::kTilesPerGroup; ++i) {
        row[i * kTileChannels] = attender.out[i][e];
      }
    }
  }

  // To the CTA that adds up a column's sums: column modulo the number of CTAs, in whose `sent`
  // those of all CTAs follow one another, those of its columns likewise.
  __device__ __forceinline__ void SendSums() const {
    constexpr int kFigures = sizeof(ChunkState) / sizeof(float);
    static_assert(sizeof(Part) == (kNumChunkVectors * kD + kFigures + 2) * sizeof(float),
                  "all of it is sent");
    for (int at = threadIdx.x; at < columns() * kD; at += kThreads) {
      const int column = at / kD, channel = at % kD;
      float reference = -INFINITY;
#pragma unroll
      for (int slot = 0; slot < Shared::kSlots; ++slot) {
        reference = fmaxf(reference, shared.slot_reference[slot][column]);
      }
      const Part& part = shared.part[column];
      const SumScale scale(part.state.mass, reference);
      const float skipped = part.vectors[kSkipped][channel];
      float sum = skipped * scale.skipped, mass = part.state.mass * scale.skipped;
#pragma unroll
      for (int slot = 0; slot < Shared::kSlots; ++slot) {
        const float own = shared.slot_reference[slot][column];
        if (own == -INFINITY) continue;  // it had no page
        const float factor = Exp2(own - scale.top);
        sum = fmaf(shared.SumsOf(slot).out[column][channel], factor, sum);
        mass = fmaf(shared.slot_mass[slot][column], factor, mass);
      }
      int owner = column, first = 0;
      for (; owner >= cluster().ctas; owner -= cluster().ctas) first += cluster().ctas;
      Part& target = shared.sent[first + cluster().rank];
      const auto send = [&](float* place, float x) {
        cluster().Send(place, owner, x, &shared.sums_sent);
      };
      send(&target.vectors[kSkipped][channel], sum);
      send(&target.vectors[kWeightedMean][channel], part.vectors[kWeightedMean][channel]);
      send(&target.vectors[kAttended][channel], part.vectors[kAttended][channel] + skipped);
      if (channel < kFigures) {
        send(reinterpret_cast<float*>(&target.state) + channel,
             reinterpret_cast<const float*>(&part.state)[channel]);
      }
      if (channel > 0) continue;
      send(&target.mass, mass);
      send(&target.top, scale.top);
    }
  }

  // Adds up all CTAs' sums of a column, from `sent` on. Returns what its values are relative to.
  __device__ __forceinline__ float Gather(const Part* sent) const {
    constexpr int kMass = offsetof(Part, mass) / sizeof(float);
    const int lane = threadIdx.x % 32, ctas = cluster().ctas;
    // Lane i has CTA i's.
    const float own = lane < ctas ? sent[lane].top : -INFINITY;
    const float top = WarpMax(own);
    const float factor = own == -INFINITY ? 0.0f : Exp2(own - top);
    for (int at = threadIdx.x; at / 32 * 32 < kPartFloats; at += kThreads) {
      const bool relative = at < kD || at == kMass;  // kSkipped is the first
      const float* from_cta = reinterpret_cast<const float*>(sent) + min(at, kPartFloats - 1);
      float sum = 0;
#pragma unroll
      for (int i = 0; i < kMaxConcludeCtas; ++i) {
        const float x = i < ctas ? from_cta[i * kPartFloats] : 0.0f;
        const float of = __shfl_sync(0xffffffffu, factor, i);
        sum = fmaf(x, relative ? of : 1.0f, sum);
      }
      if (at < kPartFloats) reinterpret_cast<float*>(&shared.total)[at] = sum;
    }
    return top;
  }

  // What of a column lies in global memory: the dense tail's part, for the second warp in the
  // Hadamard frame, and where its output goes.
  struct ColumnEnds {
    int64_t row;
    DensePart<Traits> dense;

    __device__ __forceinline__ ColumnEnds(const HeadConcluder& of, int column)
        : row(OutputRow(of.p, of.from, of.head(), column)),
          dense(of.p, int64_t{of.head_index()} * of.p.work.columns + column, threadIdx.x % 32) {
      if (threadIdx.x / 32 == 1) dense.Rotate(threadIdx.x % 32);
    }
  };

  // The CTA's columns of the head; in the first one the head's decision.
  __device__ __forceinline__ void Finish() const {
    int column = cluster().rank;
    if (column >= columns()) return;
    const bool has_theta = HasTheta(from);
    const float theta = ThetaOf(p, from, head_index());
    ColumnEnds ends(*this, column);
    RowCluster::Receive(&shared.sums_sent);
    for (const Part* sent = shared.sent;; sent += cluster().ctas) {
      const float top = Gather(sent);
      __syncthreads();
      const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
      const float lse = shared.lse[column];
      const Part& total = shared.total;
      if (warp == 0) {
        ColumnVector<Traits> out(total.vectors[kSkipped], 1, lane);
        StoreColumn<Traits>(p, ends.row, lse, ends.dense, out, total.mass, top, lane);
      } else if (warp == 1) {
        const float2 own =
            ColumnFigures<Traits>(lse, ends.dense, lane, total.vectors[kWeightedMean],
                                  total.vectors[kAttended], total.state);
        if (lane == 0) {
          cluster().Send(&shared.figures[column].x, 0, own.x, &shared.figures_sent);
          cluster().Send(&shared.figures[column].y, 0, own.y, &shared.figures_sent);
        }
      }
      column += cluster().ctas;
      if (column >= columns()) break;
      ends = ColumnEnds(*this, column);
      __syncthreads();
    }
    if (cluster().rank > 0 || threadIdx.x > 0) return;
    RowCluster::Receive(&shared.figures_sent);
    HeadDecision& decision = p.decisions[head_index()];
    StoreFigures(decision, columns(), [this](int i) { return shared.figures[i]; });
    if (has_theta) decision.theta = theta;
  }

  __device__ __forceinline__ void Run() {
    cluster().Start();
    Attender attender(p, shared, 0);
    Select(attender);
    Attend(attender);
    Finish();
  }
};

template <class Traits>
__global__ void __launch_bounds__(ConcludeShared<Traits>::kThreads, 1)
    ProgressiveConcludeKernel(const __grid_constant__ ProgressiveArgs p) {
  using Shared = ConcludeShared<Traits>;
  extern __shared__ __align__(16) std::byte shared_bytes[];
  auto& shared = *reinterpret_cast<Shared*>(shared_bytes);
  static_assert(sizeof(Shared) <= size_t{227} << 10, "what a CTA may have");
  shared.InitBarriers();
  HeadConcluder<Traits>(p, shared).Run();
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_PROGRESSIVE_CONCLUDE_CUH_
