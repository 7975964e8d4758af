#ifndef ADAATTN_KERNELS_CPU_SEALED_KERNELS_H_
#define ADAATTN_KERNELS_CPU_SEALED_KERNELS_H_

// What the CPU does with one kv head's part of one sealed page: integer dot products of the codes
// with 16-bit weights that hold query times range (keys) or softmax weight times range (values).
// Rounding the weights adds about 1e-5 of the largest term, far below the codes' own step.

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "hwy/aligned_allocator.h"
#include "kernels/cpu/dense_attend.h"
#include "kernels/format/page_layout.h"
#include "kernels/format/planes.h"
#include "kernels/shape.h"

namespace adaattn {

inline constexpr int32_t kMaxTiles = 16;

// From one row's weights of keys to the next: one distance for every head_dim, so that the distance
// between rows is part of an instruction.
inline constexpr int32_t kKeyWeightStride = kMaxTiles * kTileChannels;

// The order of the tiles in this backend's pool.
inline constexpr TileOrder kCpuTileOrder = TileOrder::kLanes;

// Where the sections of one kv head lie, counted from the start of any page.
struct SealedSections {
  int64_t key_scales = 0;
  int64_t key_tiles[kMaxTiles] = {};  // 4 bits, by tile of 16 channels
  int64_t key_fine[2] = {};
  int64_t value_summary = 0;
  int64_t value_scales = 0;
  int64_t value_plane[4] = {};
};
SealedSections FindSections(const PageLayout& layout, int32_t head_dim, int32_t kv_head);

// One kv head's part of one page.
struct SealedPage {
  const std::byte* base = nullptr;
  const SealedSections* at = nullptr;

  const uint8_t* key_scales() const {
    return reinterpret_cast<const uint8_t*>(base + at->key_scales);
  }
  const uint8_t* value_scales() const {
    return reinterpret_cast<const uint8_t*>(base + at->value_scales);
  }
};

// The summary of one kv head's values on one page, and its int8 mean, which stays in the page.
struct PageMean {
  ValueSummary summary;
  const int8_t* mean = nullptr;
};
inline PageMean ViewPageMean(const SealedPage& page) {
  const std::byte* section = page.base + page.at->value_summary;
  PageMean mean;
  std::memcpy(&mean.summary, section, sizeof(mean.summary));
  mean.mean = reinterpret_cast<const int8_t*>(section + sizeof(ValueSummary));
  return mean;
}

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
  void Reserve(int32_t rows);
  int16_t* weights() {
    return weights_.get();
  }                                          // of keys [rows, kKeyWeightStride], values [rows, 64]
  float* steps() { return floats_.data(); }  // [rows]: what a unit of a weight is worth
  int32_t* sums() { return sums_.data(); }   // [rows]: of weights
  float* p() { return p_.get(); }            // [rows, 64]

 private:
  hwy::AlignedFreeUniquePtr<int16_t[]> weights_;
  hwy::AlignedFreeUniquePtr<float[]> p_;
  std::vector<float> floats_;
  std::vector<int32_t> sums_;
  int32_t rows_ = 0;
};

// Sums of (q_c r_c)^2 per row, what ScoreVariance needs.
struct RowEnergy {
  float* read = nullptr;   // [rows] over the channels of the chunks below chunk_end
  float* total = nullptr;  // [rows] over all channels
};

// raw[row * 64 + t] = the 4-bit part of q.k over rank chunks [chunk_begin, chunk_end); chunk_begin
// > 0 adds to what stands there and leaves `energy` as it is. On its way it asks for what it will
// read of `next` (the page itself where there is none): sections of pages lie too far apart for the
// hardware to guess, and all of them at once would be more than it can have under way.
void ScanKeys(const SealedPage& page, const SealedPage& next, const RotatedRows& rows,
              int32_t chunk_begin, int32_t chunk_end, SealedScratch* scratch, float* raw,
              const RowEnergy& energy);

// Asks for what RefineKeys at `key_bits` and AttendSealedPage at `value_bits` will read of a page.
void PrefetchAttended(const SealedPage& page, int32_t head_dim, int32_t key_bits,
                      int32_t value_bits);

// Adds to raw what reading `chunks` chunks at `bits` (6, 8) changes against 4 bits.
void RefineKeys(const SealedPage& page, const RotatedRows& rows, int32_t bits, int32_t chunks,
                SealedScratch* scratch, float* raw);

// Where PageStatistics leaves one page's figures: row `row` at row * stride of each.
struct PageSums {
  float* max = nullptr;
  float* sum = nullptr;
  float* squares = nullptr;
  int64_t stride = 0;
};

// The largest score s_t of tokens [visible[row].begin, end) of the page, and the sums of
// exp(s_t - max) and of its square; -inf, 1 and 1 where the row sees none. `visible` null: all.
void PageStatistics(const RotatedRows& rows, const ScoreParams& params, const KeyRange* visible,
                    const float* raw, const PageSums& out);

// Softmax weights of the page's visible tokens (`visible` null: all) and acc += sum_t p v (Hadamard
// frame), values at `bits` (2 to 8). `state` holds rows as in PartialRows; its maxima may be set
// beforehand.
void AttendSealedPage(const SealedPage& page, const RotatedRows& rows, const ScoreParams& params,
                      const KeyRange* visible, const float* raw, int32_t bits,
                      SealedScratch* scratch, const PartialRows& state);

// acc[row][c] += sum over pages of weights[row * stride + page] mean[page][c] for all rows.
void AddValueMeans(const PageMean* pages, int32_t num_pages, int32_t head_dim, const float* weights,
                   int64_t stride, int32_t rows, float* acc);

// out[row * stride] = |mean - o[row]|^2, given norms[row] = |o[row]|^2.
void ValueMeanDistances(const PageMean& page, int32_t head_dim, const float* o, const float* norms,
                        int32_t rows, int64_t stride, float* out);

// out[row][rank] = sum_c q[row][c] Q[c][rank], Q FP16 [head_dim, head_dim]; and q.mu.
void RotateQueries(const uint16_t* query_basis, const float* mean, const float* q, int32_t rows,
                   int32_t head_dim, float* out, float* mean_score);

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CPU_SEALED_KERNELS_H_
