#ifndef ADAATTN_KERNELS_CPU_SEALED_KERNELS_H_
#define ADAATTN_KERNELS_CPU_SEALED_KERNELS_H_

// What the CPU does with one kv head's part of one sealed page: integer dot products of the codes
// with 16-bit weights that hold query times range (keys) or softmax weight times range (values).
// Rounding the weights adds about 1e-5 of the largest term, far below the codes' own step.

#include <cstddef>
#include <cstdint>
#include <vector>

#include "hwy/aligned_allocator.h"
#include "kernels/cpu/dense_attend.h"
#include "kernels/format/page_layout.h"
#include "kernels/format/planes.h"
#include "kernels/shape.h"

namespace adaattn {

inline constexpr int32_t kMaxTiles = 16;

// The order of the tiles in this backend's pool.
inline constexpr TileOrder kCpuTileOrder = TileOrder::kLanes;

// Where the sections of one kv head lie in one page.
struct SealedPage {
  const uint8_t* key_scales = nullptr;
  const std::byte* key_tiles[kMaxTiles] = {};  // 4 bits, by tile of 16 channels
  const std::byte* key_fine[2] = {};
  const uint8_t* value_scales = nullptr;
  const std::byte* value_plane[4] = {};
};
SealedPage ViewSealedPage(const PageLayout& layout, int32_t head_dim, int32_t kv_head,
                          const std::byte* page);

// The summary of one kv head's values on one page, and its int8 mean, which stays in the page.
struct PageMean {
  ValueSummary summary;
  const int8_t* mean = nullptr;
};
PageMean ViewPageMean(const PageLayout& layout, int32_t kv_head, const std::byte* page);

// Rows of q in the frame of the page's basis.
struct RotatedRows {
  const float* q = nullptr;     // [rows, head_dim]
  const float* mean = nullptr;  // [rows] q.mu
  int32_t rows = 0;
  int32_t head_dim = 0;
};

// From a raw sum q.k (mean score not yet added) to the score that enters the softmax.
struct ScoreParams {
  float softmax_scale = 0;
  float softcap = 0;
};

// Working memory of one thread.
class SealedScratch {
 public:
  void Reserve(int32_t rows, int32_t head_dim);
  int16_t* weights() { return weights_.get(); }  // [rows, head_dim], or [groups][rows, 64]
  float* steps() { return floats_.data(); }  // [groups * rows]: what a unit of a weight is worth
  int32_t* sums() { return sums_.data(); }   // [groups * rows]: of weights
  float* p() { return p_.get(); }            // [rows, 64]

 private:
  hwy::AlignedFreeUniquePtr<int16_t[]> weights_;
  hwy::AlignedFreeUniquePtr<float[]> p_;
  std::vector<float> floats_;
  std::vector<int32_t> sums_;
  int64_t size_ = 0;
};

// Sums of (q_c r_c)^2 per row, what ScoreVariance needs.
struct RowEnergy {
  float* read = nullptr;   // [rows] over the channels of the chunks below chunk_end
  float* total = nullptr;  // [rows] over all channels
};

// raw[row * 64 + t] = the 4-bit part of q.k over rank chunks [chunk_begin, chunk_end); chunk_begin
// > 0 adds to what stands there and leaves `energy` as it is.
void ScanKeys(const SealedPage& page, const RotatedRows& rows, int32_t chunk_begin,
              int32_t chunk_end, SealedScratch* scratch, float* raw, const RowEnergy& energy);

// Asks for what ScanKeys will read of a page; worth a page's time ahead, since sections of pages
// lie too far apart for the hardware to guess.
void PrefetchKeys(const SealedPage& page, int32_t head_dim, int32_t chunk_begin, int32_t chunk_end);

// Adds to raw what reading `chunks` chunks at `bits` (6, 8) changes against 4 bits.
void RefineKeys(const SealedPage& page, const RotatedRows& rows, int32_t bits, int32_t chunks,
                SealedScratch* scratch, float* raw);

// Log sum exp of the scores of tokens [visible[row].begin, end) of the page, and the sum of their
// squared parts of it; -inf and 1 where the row sees none.
void PageStatistics(const RotatedRows& rows, const ScoreParams& params, const KeyRange* visible,
                    const float* raw, float* lse, float* concentration);

// Softmax weights of the page's visible tokens and acc += sum_t p v (Hadamard frame), values at
// `bits` (2 to 8). `state` holds rows as in PartialRows; its maxima may be set beforehand.
void AttendSealedPage(const SealedPage& page, const RotatedRows& rows, const ScoreParams& params,
                      const KeyRange* visible, const float* raw, int32_t bits,
                      SealedScratch* scratch, const PartialRows& state);

// acc[row][c] += sum over pages of weights[page][row] mean[page][c] for all rows.
void AddValueMeans(const PageMean* pages, int32_t num_pages, int32_t head_dim, const float* weights,
                   int32_t rows, float* acc);

// out[row] = |mean - o[row]|^2.
void ValueMeanDistances(const PageMean& page, int32_t head_dim, const float* o, int32_t rows,
                        float* out);

// out[row][rank] = sum_c q[row][c] Q[c][rank], Q FP16 [head_dim, head_dim]; and q.mu.
void RotateQueries(const uint16_t* query_basis, const float* mean, const float* q, int32_t rows,
                   int32_t head_dim, float* out, float* mean_score);

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CPU_SEALED_KERNELS_H_
