#ifndef ADAATTN_KERNELS_CUDA_PROGRESSIVE_BUDGET_CUH_
#define ADAATTN_KERNELS_CUDA_PROGRESSIVE_BUDGET_CUH_

// Budget: theta of one (sequence, kv head) from the predicted error, as policy/budget.h states it.
//   o_n     = sum over pages share * mean + dense share * dense_out, in the Hadamard frame
//   inputs  share, concentration, var_s, |mean - o|^2, spread, scale_rms of each page and column
//   theta   the largest of the grid whose predicted relative error stays under the target
// A part of the kernel in progressive_theta.cuh. The CTAs of a cluster take a part of the head's
// pages each and meet twice:
//   their sums of exp2(mass) * mean, joined as those of split attention        -> L, o
//   their sums of the pages' terms, lane i of a warp at value i of the grid    -> theta
// Both products with means, which are exact as halves, are MMAs over the other factor as a half and
// what that lost.

#include "kernels/cuda/hadamard.cuh"
#include "kernels/cuda/progressive_budget_pages.cuh"

namespace adaattn {

// Of the warps' figures.
template <int kWarps>
__device__ __forceinline__ float LargestOf(const float (&x)[kWarps]) {
  float largest = -INFINITY;
#pragma unroll
  for (int i = 0; i < kWarps; i += 4) {
    const float4 a = *reinterpret_cast<const float4*>(&x[i]);
    largest = fmaxf(largest, fmaxf(fmaxf(a.x, a.y), fmaxf(a.z, a.w)));
  }
  return largest;
}
template <int kWarps>
__device__ __forceinline__ float SumOf(const float (&x)[kWarps]) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kWarps; i += 4) {
    const float4 a = *reinterpret_cast<const float4*>(&x[i]);
    sum += (a.x + a.y) + (a.z + a.w);
  }
  return sum;
}

__device__ __forceinline__ void AddSquares(const float4& x, float* sum) {
  *sum = fmaf(x.x, x.x, fmaf(x.y, x.y, fmaf(x.z, x.z, fmaf(x.w, x.w, *sum))));
}

// As a half and what that lost, `lost_at` further on.
__device__ __forceinline__ void StoreSplit(float x, __half* target, int lost_at) {
  const uint2 split = SplitPair<__half>(x, 0.0f);
  target[0] = __ushort_as_half(static_cast<uint16_t>(split.x));
  target[lost_at] = __ushort_as_half(static_cast<uint16_t>(split.y));
}

// o of a tile's columns.
template <class Traits>
struct OutputEstimator {
  using Pages = BudgetPages<Traits>;
  using Shared = BudgetShared<Traits>;
  static constexpr int kD = Traits::kHeadDim, kColumns = Traits::kColumns;
  static constexpr int kEach = Pages::kEach, kItems = 2 * Pages::kRounds;
  static constexpr int kWarpTiles = (Traits::kTiles + Traits::kWarps - 1) / Traits::kWarps;
  static constexpr int kQuads = (kD + 127) / 128;  // of channels: a lane's part of a column
  Pages& own;
  Shared& shared;
  int tile;
  // Over the blocks so far, of column g: channels 16 (warp + 8 i) + 4 t..+3.
  float high = -INFINITY, mass = 0, out[kWarpTiles][4] = {};
  float own_high[kEach];        // as `high`, of the lane's columns
  float dense_lse = -INFINITY;  // of column `warp`

  __device__ __forceinline__ OutputEstimator(Pages& pages, int column_tile)
      : own(pages), shared(pages.shared), tile(column_tile) {
#pragma unroll
    for (int j = 0; j < kEach; ++j) own_high[j] = -INFINITY;
  }

  // Starts to bring column `warp` of the dense tail.
  __device__ __forceinline__ void FetchDense() {
    if (own.warp >= kColumns) return;
    const ProgressiveArgs& p = own.p;
    const int64_t at = own.head_index * p.work.columns + tile * kTileColumns + own.warp;
    dense_lse = reinterpret_cast<const float*>(p.workspace + p.work.dense_lse)[at];
    const float* row = reinterpret_cast<const float*>(p.workspace + p.work.dense_out) + at * kD;
#pragma unroll
    for (int c = 0; c < kD; c += 128) {
      const int mine = c + 4 * own.lane;
      if (mine < kD) CopyAsync16(&shared.dense[own.warp][mine], row + mine);
    }
    CommitCopies();
  }

  // That column to the Hadamard frame.
  __device__ __forceinline__ void RotateDense() const {
    WaitCopies<0>();
    __syncwarp();
    float x[1][(kD + 31) / 32];
#pragma unroll
    for (int c = 0; c < kD; c += 32) {
      x[0][c / 32] = own.lane + c < kD ? shared.dense[own.warp][own.lane + c] : 0.0f;
    }
    RotateHadamard<kD>(x, own.lane);
#pragma unroll
    for (int c = 0; c < kD; c += 32) {
      if (own.lane + c < kD) shared.dense[own.warp][own.lane + c] = x[0][c / 32];
    }
    __syncwarp();
  }

  // Leaves the weights of the block's pages in shared memory. Returns what the sums of blocks
  // before must be rescaled by.
  __device__ __forceinline__ float Weigh(const PageBlock& block) {
    const int g = own.g, t = own.t;
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      float top = -INFINITY;
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        top = fmaxf(top, EstimatedLog2Mass(own.stats[i / 2][i % 2][j]));
      }
      top = ColumnMax(top);
      if (g == 0) shared.high[t + 4 * j][own.warp] = top;
    }
    __syncthreads();
    const float next = fmaxf(high, LargestOf(shared.high[g % kColumns]));
    const float rescale = Exp2(high - (next == -INFINITY ? 0.0f : next));
    high = next;
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      own_high[j] = fmaxf(own_high[j], LargestOf(shared.high[t + 4 * j]));
      const float base = own_high[j] == -INFINITY ? 0.0f : own_high[j];
      float sum = 0;
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const int local = own.WarpBegin(i / 2) + i % 2 * 8 + g, n = t + 4 * j;
        if (own.WarpBegin(i / 2) >= block.rows) break;
        const PageStats& stats = own.stats[i / 2][i % 2][j];
        const float x = Exp2(EstimatedLog2Mass(stats) - base);
        sum += x;
        float weight =
            local < block.rows ? x * (own.Facts(local).mean_scale * own.inverse_unit) : 0.0f;
        if (i == 0 && block.first + local == 0) {  // no other item is ever page 0
          const bool stands = own.FirstTokenStands(tile * kTileColumns + n, stats);
          shared.first_weight[n] = stands ? x : 0.0f;
          if (stands) weight = 0;
        }
        StoreSplit(weight, &shared.weights[n][local], kTileColumns * (Shared::kPages + 8));
      }
      sum = ColumnSum(sum);
      if (g == 0) shared.mass[t + 4 * j][own.warp] = sum;
    }
    __syncthreads();
    mass = fmaf(mass, rescale, SumOf(shared.mass[g % kColumns]));
    return rescale;
  }

  // Adds the block's means, weighted.
  __device__ __forceinline__ void AddMeans(const PageBlock& block, float rescale) {
    const int lane = own.lane, g = own.g, t = own.t;
    const bool sink = block.first == 0 && block.rows > 0;
#pragma unroll
    for (int i = 0; i < kWarpTiles; ++i) {
      const int channels = own.warp + Traits::kWarps * i;
      if (channels >= Traits::kTiles) break;
      float even[4] = {}, odd[4] = {};
#pragma unroll 2
      for (int first = 0; first < block.rows; first += 16) {
        uint32_t a[4], bytes[2];
        LoadMatrices<false>(a, &shared.weights[lane % 16][first + lane / 16 * 8]);
        LoadTransposed(bytes,
                       own.Summary(first + lane % 16) + sizeof(ValueSummary) + channels * 16);
        Mma16x8x16<__half>(even, a, HalvesFromBytes(bytes[0], 0x4240u),
                           HalvesFromBytes(bytes[1], 0x4240u));
        Mma16x8x16<__half>(odd, a, HalvesFromBytes(bytes[0], 0x4341u),
                           HalvesFromBytes(bytes[1], 0x4341u));
      }
      // Column j of an accumulator is channel 2 j (+ 1) of the tile: the lane has four in a row.
      const float sums[4] = {even[0] + even[2], odd[0] + odd[2], even[1] + even[3],
                             odd[1] + odd[3]};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        out[i][e] = fmaf(out[i][e], rescale, sums[e] * own.unit);
        if (sink) {
          out[i][e] = fmaf(shared.first_weight[g % kColumns],
                           shared.first[16 * channels + 4 * t + e], out[i][e]);
        }
      }
    }
  }

  // Leaves the CTA's sums to the cluster.
  __device__ __forceinline__ void StorePartial() const {
    if (own.g >= kColumns) return;
    BudgetPartial<Traits>& partial = shared.partial[tile % 2];
#pragma unroll
    for (int i = 0; i < kWarpTiles; ++i) {
      const int channels = own.warp + Traits::kWarps * i;
      if (channels >= Traits::kTiles) break;
      *reinterpret_cast<float4*>(&partial.out[own.g][16 * channels + 4 * own.t]) =
          make_float4(out[i][0], out[i][1], out[i][2], out[i][3]);
    }
    if (own.warp != 0 || own.t != 0) return;
    partial.high[own.g] = high;
    partial.mass[own.g] = mass;
  }

  // L and o of column `warp`, from the sums of all CTAs and the dense tail. A lane has channels
  // 4 (lane + 32 q) to + 3.
  __device__ __forceinline__ void Join() const {
    const int n = own.warp, lane = own.lane;
    const RowCluster& cluster = own.cluster;
    BudgetPartial<Traits>* partial = &shared.partial[tile % 2];
    // Of all CTAs at once, and first of all: their memory is far.
    float4 parts[kMaxBudgetCtas];
    const auto load_parts = [&](int q) {
#pragma unroll
      for (int i = 0; i < kMaxBudgetCtas; ++i) {
        if (i >= cluster.ctas) break;
        const auto* row = reinterpret_cast<const float4*>(cluster.At(partial, i)->out[n]);
        if (HasQuad(q)) parts[i] = row[lane + 32 * q];
      }
    };
    load_parts(0);
    // Lane i has CTA i's, as have those that many (a power of two) further on.
    const BudgetPartial<Traits>* other = cluster.At(partial, lane & (cluster.ctas - 1));
    const float other_high = other->high[n], other_mass = other->mass[n];
    float top = other_high;
    for (int step = 1; step < cluster.ctas; step *= 2) {
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, step));
    }
    top = fmaxf(top, dense_lse);
    const float base = top == -INFINITY ? 0.0f : top;
    const float factor = Exp2(other_high - base), dense_factor = Exp2(dense_lse - base);
    float total = other_mass * factor;
    for (int step = 1; step < cluster.ctas; step *= 2) {
      total += __shfl_xor_sync(0xffffffffu, total, step);
    }
    total += dense_factor;
    float4 o[kQuads] = {};
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      if (q > 0) load_parts(q);
      if (HasQuad(q)) {
        AddScaled(reinterpret_cast<const float4*>(shared.dense[n])[lane + 32 * q], dense_factor,
                  &o[q]);
      }
#pragma unroll
      for (int i = 0; i < kMaxBudgetCtas; ++i) {
        if (i >= cluster.ctas) break;
        const float share = __shfl_sync(0xffffffffu, factor, i);
        if (HasQuad(q)) AddScaled(parts[i], share, &o[q]);
      }
    }
    StoreOutput(o, total > 0 ? __fdividef(1.0f, total) : 0.0f,
                total > 0 ? top + Log2(total) : -INFINITY);
  }

  __device__ __forceinline__ bool HasQuad(int q) const { return 4 * (own.lane + 32 * q) < kD; }

  // Column `warp`'s o, `inverse` times those of its lanes.
  __device__ __forceinline__ void StoreOutput(const float4 (&of)[kQuads], float inverse,
                                              float lse) const {
    const int n = own.warp, lane = own.lane;
    float4 o[kQuads] = {};
    float square = 0, distance = 0;
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      AddScaled(of[q], inverse, &o[q]);
      AddSquares(o[q], &square);
      if (!own.HasSink() || !HasQuad(q)) continue;
      float4 off = reinterpret_cast<const float4*>(shared.first)[lane + 32 * q];
      AddScaled(o[q], -1.0f, &off);
      AddSquares(off, &distance);
    }
    square = WarpSum(square);
    distance = WarpSum(distance);
    const float inverse_norm = square > 0 ? rsqrtf(square) : 0.0f;
    if (lane == 0) {
      shared.column[tile * kTileColumns + n] = BudgetColumn{
          lse, square * inverse_norm, inverse_norm * inverse_norm * shared.column_weight, distance};
    }
    __half* row = own.Output(tile) + 2 * n * Shared::kOutputStride + 4 * lane;
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      const uint2 even = SplitPair<__half>(o[q].x * inverse_norm, o[q].z * inverse_norm);
      const uint2 odd = SplitPair<__half>(o[q].y * inverse_norm, o[q].w * inverse_norm);
      if (!HasQuad(q)) continue;
      *reinterpret_cast<uint2*>(row + 128 * q) = make_uint2(even.x, odd.x);
      *reinterpret_cast<uint2*>(row + Shared::kOutputStride + 128 * q) = make_uint2(even.y, odd.y);
    }
  }

  __device__ __forceinline__ void Run() {
    for (int i = 0; i < own.blocks; ++i) {
      const PageBlock block = own.Block(i);
#pragma unroll
      for (int round = 0; round < Pages::kRounds; ++round) own.LoadRound(block, round, tile);
      if (i == 0) FetchDense();
      own.Hold(i);
      AddMeans(block, Weigh(block));
    }
    StorePartial();
    own.cluster.Arrive();
    if (own.warp < kColumns) RotateDense();
    own.cluster.Wait();
    if (own.warp < kColumns) Join();
  }
};

// The pages' terms, once o is known.
template <class Traits>
struct TermSummer {
  using Pages = BudgetPages<Traits>;
  using Shared = BudgetShared<Traits>;
  static constexpr int kEach = Pages::kEach;
  Pages& own;
  Shared& shared;

  // |mean - o|^2 of the lane's pages of the warp's 16 from `begin` on, for its columns of a tile.
  __device__ __forceinline__ void MeanDistances(int begin, int tile,
                                                float (&distance)[2][kEach]) const {
    float dots[kEach][4] = {};  // o and what it lost, for page g; the same for page g + 8
    int squares[2] = {};
    const std::byte* means = own.Summary(begin + own.g) + sizeof(ValueSummary) + 4 * own.t;
    const __half* output = own.Output(tile) + own.g * Shared::kOutputStride + 4 * own.t;
#pragma unroll 2
    for (int k = 0; k < Traits::kTiles; ++k) {
      const int x = *reinterpret_cast<const int*>(means + 16 * k);
      const int y = *reinterpret_cast<const int*>(means + 8 * Shared::kSummaryBytes + 16 * k);
      const uint32_t a[4] = {HalvesFromBytes(x, 0x4240u), HalvesFromBytes(y, 0x4240u),
                             HalvesFromBytes(x, 0x4341u), HalvesFromBytes(y, 0x4341u)};
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const uint2 b =
            *reinterpret_cast<const uint2*>(output + 8 * j * Shared::kOutputStride + 16 * k);
        Mma16x8x16<__half>(dots[j], a, b.x, b.y);
      }
      squares[0] = __dp4a(x, x, squares[0]);
      squares[1] = __dp4a(y, y, squares[1]);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float scale = own.Facts(begin + 8 * half + own.g).mean_scale;
      const float square = QuadSum(static_cast<float>(squares[half])) * scale * scale;
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const float norm = shared.column[tile * kTileColumns + own.t + 4 * j].norm;
        const float dot = (dots[j][2 * half] + dots[j][2 * half + 1]) * scale * norm;
        distance[half][j] = fmaxf(fmaf(norm, norm, square - 2 * dot), 0.0f);
      }
    }
  }

  // Adds the lane's columns of a tile to its pages' budgets.
  __device__ __forceinline__ void AddTile(const PageBlock& block, int round, int tile,
                                          PageBudget (&budgets)[2]) const {
    float distance[2][kEach];
    MeanDistances(own.WarpBegin(round), tile, distance);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int local = own.WarpBegin(round) + 8 * half + own.g;
      if (local >= block.rows) continue;
      const ValueSummary& facts = own.Facts(local);
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const int n = tile * kTileColumns + own.t + 4 * j;
        const PageStats& stats = own.stats[round][half][j];
        const BudgetColumn& column = shared.column[n];
        PageErrorInputs inputs;
        inputs.share = TermsOf(stats, column.lse).share;
        inputs.concentration = fabsf(stats.concentration);
        inputs.score_variance = stats.variance;
        inputs.mean_distance2 = distance[half][j];
        inputs.spread = facts.spread;
        inputs.scale_rms = facts.scale_rms;
        const bool sink = round + half == 0 && block.first + local == 0;
        if (sink && own.FirstTokenStands(n, stats)) {
          inputs.mean_distance2 = column.first_distance;
          inputs.spread = 0;
          inputs.scale_rms = shared.first_rms;
        }
        AddToBudget(inputs.share, ErrorParts(inputs, Traits::kHeadDim), column.weight,
                    &budgets[half]);
      }
    }
  }

  // Adds the warp's pages to lane i's sum at value i of the grid. `budgets`: of the lane's pages,
  // by the columns that it has.
  __device__ __forceinline__ void AddPages(const PageBlock& block, int round,
                                           PageBudget (&budgets)[2], ErrorTerms* sums) const {
    WarpTerms& terms = shared.terms[own.warp];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = 8 * half + own.g, page = block.first + own.WarpBegin(round) + row;
      const PageErrorParts& mine = budgets[half].parts;
      const PageErrorParts parts{QuadSum(mine.skipped), QuadSum(mine.score), QuadSum(mine.value)};
      const int below = NumThetasBelow(QuadMax(budgets[half].share));
      const bool cut = PageVisibility(own.s, page) == Visibility::kPart;
      const TermFactors(&factors)[kNumRungs] = shared.factors[page == 0 ? 2 : cut ? 1 : 0];
      static_assert(kNumRungs == 5, "a lane a rung, and one more");
      terms.at[row][own.t] = TermsOf(parts, factors[own.t]);
      if (own.t == 0) {
        terms.at[row][4] = TermsOf(parts, factors[4]);
        terms.below[row] = below;
      }
    }
    __syncwarp();
    if (own.lane < kNumBudgetThetas) {
#pragma unroll 4
      for (int row = 0; row < kWarpPages; ++row) {
        AddTerms(terms.at[row][BudgetRung(terms.below[row], own.lane)], sums);
      }
    }
    __syncwarp();
  }

  // Lane i's sum over the warp's pages at value i of the grid.
  __device__ __forceinline__ ErrorTerms Run() const {
    const int tiles = own.tiles();
    const bool loaded = tiles * own.blocks == 1;
    ErrorTerms sums;
    for (int i = own.blocks - 1; i >= 0; --i) {
      own.Hold(i);
      const PageBlock block = own.Block(i);
#pragma unroll
      for (int round = 0; round < Pages::kRounds; ++round) {
        if (own.WarpBegin(round) >= block.rows) break;
        PageBudget budgets[2];
        for (int tile = 0; tile < tiles; ++tile) {
          if (!loaded) own.LoadRound(block, round, tile);
          AddTile(block, round, tile, budgets);
        }
        AddPages(block, round, budgets, &sums);
      }
    }
    return sums;
  }
};

// Theta from the sums of all warps of a cluster; its first CTA stores it.
template <class Traits>
__device__ __forceinline__ void StoreTheta(const BudgetPages<Traits>& own, const ErrorTerms& sums) {
  const RowCluster& cluster = own.cluster;
  BudgetShared<Traits>& shared = own.shared;
  shared.warp_sums[own.warp][own.lane] = sums;
  __syncthreads();
  ErrorTerms total;
  if (own.warp == 0) {
#pragma unroll
    for (int i = 0; i < Traits::kWarps; ++i) AddTerms(shared.warp_sums[i][own.lane], &total);
  }
  if (cluster.ctas > 1) {
    if (own.warp == 0) cluster.At(&shared, 0)->cta_sums[cluster.rank][own.lane] = total;
    cluster.Sync();
    total = ErrorTerms();
#pragma unroll
    for (int i = 0; i < kMaxBudgetCtas; ++i) {
      if (i < cluster.ctas) AddTerms(shared.cta_sums[i][own.lane], &total);
    }
  }
  if (cluster.rank != 0 || own.warp != 0) return;
  const uint32_t fit =
      __ballot_sync(0xffffffffu, own.lane < kNumBudgetThetas && FitsBudget(total, own.target));
  if (own.lane != 0) return;
  own.p.thetas[own.head_index] = fit == 0 ? 0.0f : BudgetTheta(31 - __clz(fit));
}

// By all threads of a cluster, after BudgetPages::Prepare.
template <class Traits>
__device__ __forceinline__ void ThetaFromBudget(BudgetPages<Traits>& own) {
  if (own.HasSink()) own.StoreFirstToken();
  for (int tile = 0; tile < own.tiles(); ++tile) OutputEstimator<Traits>(own, tile).Run();
  __syncthreads();
  StoreTheta(own, TermSummer<Traits>{own, own.shared}.Run());
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_PROGRESSIVE_BUDGET_CUH_
