#ifndef ADAATTN_KERNELS_FORMAT_SEAL_H_
#define ADAATTN_KERNELS_FORMAT_SEAL_H_

// Sealing one kv head's 64 tokens and decoding them again: plain host code that states the format.
// Backends may do the same faster; tests hold them to this.

#include <cstddef>
#include <cstdint>

#include "kernels/format/basis.h"
#include "kernels/format/page_layout.h"
#include "kernels/format/planes.h"
#include "kernels/shape.h"

namespace adaattn {

// What names one kv head's part of a sealed page.
struct SealedHead {
  int32_t head_dim = 0;
  int32_t kv_head = 0;
  PageLayout layout;  // MakePageLayout(shape, stored_bits)
  TileOrder order = TileOrder::kLanes;
};

// Encodes one page of one kv head and returns its drift ratio (see DriftRatio).
//
//   keys, values  [64, head_dim], as the model made them (before any rotation)
//   page          the whole page, layout.page_bytes; only this head's sections are written
//
// Each section byte of the head is written, so a page need not be cleared before.
float SealHead(const SealedHead& head, const BasisView& basis, const float* keys,
               const float* values, std::byte* page);

// Decodes keys at `bits` (4, 6, 8; at most the stored bits) of the leading `chunks` rank chunks
// into `out` [64, head_dim], in the rotated frame without the mean. Channels beyond are 0.
void DecodeRotatedKeys(const SealedHead& head, const std::byte* page, int32_t bits, int32_t chunks,
                       float* out);

// Decodes values at `bits` (0, 2, 4, 6, 8; at most the stored bits) into `out` [64, head_dim], in
// the Hadamard frame. 0 bits: every token is the page's mean.
void DecodeRotatedValues(const SealedHead& head, const std::byte* page, int32_t bits, float* out);

// Decodes the value of the page's first token alone, [head_dim] in the Hadamard frame, at `bits` (2
// to 8), and returns the root mean square of its ranges; see kSinkConcentration.
float DecodeFirstRotatedValue(const SealedHead& head, const std::byte* page, int32_t bits,
                              float* out);

// Keys and values brought back to the model's frame: keys through RestoreKey, values through the
// Hadamard rotation.
void DecodeKeys(const SealedHead& head, const BasisView& basis, const std::byte* page, int32_t bits,
                int32_t chunks, float* out);
void DecodeValues(const SealedHead& head, const std::byte* page, int32_t bits, float* out);

// Scale bytes [head_dim] of this head's keys and [64, ValueGroups] of its values.
const uint8_t* KeyScales(const SealedHead& head, const std::byte* page);
const uint8_t* ValueScales(const SealedHead& head, const std::byte* page);

// The value summary, and its mean [head_dim] as int8 (times mean_scale: in the Hadamard frame).
ValueSummary ReadValueSummary(const SealedHead& head, const std::byte* page);
const int8_t* ValueMean(const SealedHead& head, const std::byte* page);

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_FORMAT_SEAL_H_
