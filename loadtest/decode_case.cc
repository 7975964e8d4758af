#include "loadtest/decode_case.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/status.h"
#include "kernels/format/float_types.h"
#include "kernels/format/page_layout.h"
#include "loadtest/bench_case.h"

namespace adaattn {
namespace {

// Random pages are drawn once and repeated, each from another place of this many elements: drawing
// gigabytes would take longer than everything else.
constexpr int64_t kNoiseElements = int64_t{1} << 22;

std::vector<std::byte> Noise(DType type, int64_t count, float sigma, uint64_t seed) {
  std::mt19937_64 engine(seed);
  std::normal_distribution<float> normal(0, sigma);
  std::vector<std::byte> data(count * DTypeBytes(type));
  for (int64_t i = 0; i < count; ++i) WriteElement(data.data(), type, i, normal(engine));
  return data;
}

// Keeps the larger of the two in *worst; NaN is the largest of all.
void KeepWorst(double value, double* worst) {
  if (!std::isnan(*worst) && !(value <= *worst)) *worst = value;
}

}  // namespace

std::string DecodeCaseOptions::Name() const {
  const int32_t most = *std::max_element(kv_lens.begin(), kv_lens.end());
  std::string name =
      BenchCaseName(DTypeName(kv_type), shape, static_cast<int64_t>(kv_lens.size()), most);
  if (q_len > 1) absl::StrAppend(&name, "_q", q_len);
  if (window > 0) absl::StrAppend(&name, "_w", window);
  if (softcap > 0) absl::StrAppend(&name, "_cap", softcap);
  if (in_type != DType::kBf16) absl::StrAppend(&name, "_in_", DTypeName(in_type));
  return name;
}

absl::StatusOr<std::unique_ptr<DecodeCase>> DecodeCase::Create(const DecodeCaseOptions& options,
                                                               int32_t num_ctas) {
  std::unique_ptr<DecodeCase> made(new DecodeCase(options));
  made->kernel_ = FindDecodeKernel(options.kv_type, options.shape.head_dim);
  if (made->kernel_ == nullptr) return absl::UnimplementedError(options.Name());
  ADAATTN_RETURN_IF_ERROR(made->FillPool());
  ADAATTN_RETURN_IF_ERROR(made->Upload(num_ctas));
  return made;
}

DecodeCase::~DecodeCase() {
  for (void* allocation : allocations_) (void)cudaFree(allocation);
}

absl::StatusOr<void*> DecodeCase::Allocate(size_t bytes) {
  void* pointer = nullptr;
  ADAATTN_RETURN_IF_CUDA_ERROR(cudaMalloc(&pointer, std::max<size_t>(bytes, 256)));
  allocations_.push_back(pointer);
  return pointer;
}

template <typename T>
absl::Status DecodeCase::CopyIn(const std::vector<T>& host, const T** device) {
  const size_t bytes = host.size() * sizeof(T);
  ADAATTN_ASSIGN_OR_RETURN(void* pointer, Allocate(bytes));
  ADAATTN_RETURN_IF_CUDA_ERROR(cudaMemcpy(pointer, host.data(), bytes, cudaMemcpyHostToDevice));
  *device = static_cast<const T*>(pointer);
  return absl::OkStatus();
}

absl::Status DecodeCase::FillPool() {
  const AttentionShape& shape = options_.shape;
  int64_t num_pages = 0;
  for (const int32_t length : options_.kv_lens)
    num_pages += (length + kPageTokens - 1) / kPageTokens;
  num_pool_pages_ = num_pages + 1;
  const int64_t page_bytes = DensePageBytes(shape, options_.kv_type);
  ADAATTN_ASSIGN_OR_RETURN(void* pool, Allocate(num_pool_pages_ * page_bytes));
  pool_ = static_cast<std::byte*>(pool);
  ADAATTN_RETURN_IF_CUDA_ERROR(cudaMemset(pool_, 0xff, num_pool_pages_ * page_bytes));

  std::vector<int64_t> order(num_pages);
  std::iota(order.begin(), order.end(), 1);
  std::mt19937_64 engine(options_.seed);
  std::shuffle(order.begin(), order.end(), engine);
  const int64_t page_elements = page_bytes / DTypeBytes(options_.kv_type);
  const int64_t noise_elements = std::max(kNoiseElements, 2 * page_elements);
  const auto noise = Noise(options_.kv_type, noise_elements, 1, options_.seed + 1);
  for (const int64_t page : order) {
    page_table_.push_back(static_cast<uint32_t>(page * page_bytes / kPageAlignment));
    const int64_t from = static_cast<int64_t>(engine() % (noise_elements - page_elements)) *
                         DTypeBytes(options_.kv_type);
    ADAATTN_RETURN_IF_CUDA_ERROR(cudaMemcpyAsync(pool_ + page * page_bytes, noise.data() + from,
                                                 page_bytes, cudaMemcpyHostToDevice, nullptr));
  }
  // Poison the tails.
  int64_t last = -1;
  const int64_t row_bytes = int64_t{shape.head_dim} * DTypeBytes(options_.kv_type);
  for (const int32_t length : options_.kv_lens) {
    last += (length + kPageTokens - 1) / kPageTokens;
    const int32_t used = length % kPageTokens;
    if (used == 0) continue;
    for (int32_t i = 0; i < 2 * shape.num_kv_heads; ++i) {
      std::byte* at = pool_ + order[last] * page_bytes + (i * kPageTokens + used) * row_bytes;
      ADAATTN_RETURN_IF_CUDA_ERROR(cudaMemset(at, 0xff, (kPageTokens - used) * row_bytes));
    }
  }
  return FromCuda(cudaDeviceSynchronize(), "FillPool");
}

absl::Status DecodeCase::Upload(int32_t num_ctas) {
  const AttentionShape& shape = options_.shape;
  int32_t table = 0;
  for (size_t i = 0; i < options_.kv_lens.size(); ++i) {
    DeviceSequence sequence;
    sequence.total_len = sequence.kv_len = options_.kv_lens[i];
    sequence.q_len = options_.q_len;
    sequence.q_row = static_cast<int32_t>(i) * options_.q_len;
    sequence.q_start = std::max(sequence.total_len - options_.q_len, 0);
    sequence.window = options_.window;
    sequence.page_table = table;
    sequence.softmax_scale = 1.0f / std::sqrt(static_cast<float>(shape.head_dim));
    sequence.softcap = options_.softcap;
    if (options_.scales) {
      sequence.key_scales = static_cast<int32_t>(scales_.size());
      for (int32_t h = 0; h < shape.num_kv_heads; ++h) scales_.push_back(0.5f + 0.125f * h);
      sequence.value_scales = static_cast<int32_t>(scales_.size());
      for (int32_t h = 0; h < shape.num_kv_heads; ++h) scales_.push_back(1.5f - 0.0625f * h);
    }
    table += (sequence.total_len + kPageTokens - 1) / kPageTokens;
    sequences_.push_back(sequence);
  }
  num_rows_ = static_cast<int64_t>(options_.kv_lens.size()) * options_.q_len;
  const int64_t elements = num_rows_ * shape.num_q_heads * shape.head_dim;
  q_ = Noise(options_.in_type, elements, options_.q_sigma, options_.seed + 2);
  out_.resize(elements * DTypeBytes(options_.out_type));
  lse_.resize(num_rows_ * shape.num_q_heads);
  decisions_.resize(sequences_.size() * shape.num_kv_heads);
  row_tiles_ = ChooseRowTiles(shape.head_dim, shape.group_size(), options_.q_len);
  schedule_ =
      ScheduleDecode(sequences_, shape.num_kv_heads, shape.group_size(), row_tiles_, num_ctas);

  DecodeParams& p = params_;
  p.memory.pool = pool_;
  ADAATTN_RETURN_IF_ERROR(CopyIn(page_table_, &p.page_table));
  ADAATTN_RETURN_IF_ERROR(CopyIn(sequences_, &p.sequences));
  ADAATTN_RETURN_IF_ERROR(CopyIn(schedule_.items, &p.items));
  ADAATTN_RETURN_IF_ERROR(CopyIn(schedule_.cta_items, &p.cta_items));
  ADAATTN_RETURN_IF_ERROR(CopyIn(scales_, &p.scales));
  const std::byte* q = nullptr;
  ADAATTN_RETURN_IF_ERROR(CopyIn(q_, &q));
  p.q = q;
  ADAATTN_ASSIGN_OR_RETURN(p.out, Allocate(out_.size()));
  ADAATTN_ASSIGN_OR_RETURN(void* lse, Allocate(lse_.size() * sizeof(float)));
  ADAATTN_ASSIGN_OR_RETURN(void* decisions, Allocate(decisions_.size() * sizeof(HeadDecision)));
  const int64_t block_rows = int64_t{schedule_.num_slots} * 8 * row_tiles_;
  ADAATTN_ASSIGN_OR_RETURN(void* partial_out, Allocate(block_rows * shape.head_dim * 4));
  ADAATTN_ASSIGN_OR_RETURN(void* partial_state, Allocate(block_rows * sizeof(float2)));
  ADAATTN_ASSIGN_OR_RETURN(void* counters, Allocate(schedule_.num_groups * sizeof(int32_t)));
  ADAATTN_RETURN_IF_CUDA_ERROR(cudaMemset(counters, 0, schedule_.num_groups * sizeof(int32_t)));
  p.lse = static_cast<float*>(lse);
  p.decisions = static_cast<HeadDecision*>(decisions);
  p.partial_out = static_cast<float*>(partial_out);
  p.partial_state = static_cast<float2*>(partial_state);
  p.counters = static_cast<int32_t*>(counters);
  p.num_ctas = num_ctas;
  p.num_q_heads = shape.num_q_heads;
  p.num_kv_heads = shape.num_kv_heads;
  p.head_dim = shape.head_dim;
  p.in_type = options_.in_type;
  p.out_type = options_.out_type;
  return absl::OkStatus();
}

absl::Status DecodeCase::Run(cudaStream_t stream) const {
  return kernel_->run(params_, row_tiles_, stream);
}

int64_t DecodeCase::kv_bytes_as_bf16() const {
  return kv_bytes() / DTypeBytes(options_.kv_type) * 2;
}

int64_t DecodeCase::kv_bytes() const {
  int64_t tokens = 0;
  for (const DeviceSequence& sequence : sequences_) {
    const KeyRange keys = AttendedKeys(sequence);
    tokens += keys.end - keys.begin;
  }
  return tokens * 2 * options_.shape.num_kv_heads * options_.shape.head_dim *
         DTypeBytes(options_.kv_type);
}

absl::StatusOr<DecodeError> DecodeCase::Check(int32_t head_stride) {
  const size_t decision_bytes = decisions_.size() * sizeof(HeadDecision);
  ADAATTN_RETURN_IF_CUDA_ERROR(cudaMemset(params_.out, 0xff, out_.size()));
  ADAATTN_RETURN_IF_CUDA_ERROR(cudaMemset(params_.lse, 0xff, lse_.size() * sizeof(float)));
  ADAATTN_RETURN_IF_CUDA_ERROR(cudaMemset(params_.decisions, 0, decision_bytes));
  ADAATTN_RETURN_IF_ERROR(Run(nullptr));
  ADAATTN_RETURN_IF_CUDA_ERROR(cudaDeviceSynchronize());
  ADAATTN_RETURN_IF_CUDA_ERROR(
      cudaMemcpy(out_.data(), params_.out, out_.size(), cudaMemcpyDeviceToHost));
  ADAATTN_RETURN_IF_CUDA_ERROR(
      cudaMemcpy(lse_.data(), params_.lse, lse_.size() * sizeof(float), cudaMemcpyDeviceToHost));
  ADAATTN_RETURN_IF_CUDA_ERROR(
      cudaMemcpy(decisions_.data(), params_.decisions, decision_bytes, cudaMemcpyDeviceToHost));
  DecodeError error;
  int64_t checked = 0;
  for (int32_t s = 0; s < static_cast<int32_t>(sequences_.size()); ++s) {
    for (int32_t h = s % head_stride; h < options_.shape.num_kv_heads; h += head_stride) {
      ADAATTN_RETURN_IF_ERROR(Compare(s, h, &error));
      checked += options_.shape.group_size() * options_.q_len;
    }
  }
  error.mean_out /= static_cast<double>(std::max<int64_t>(checked, 1));
  return error;
}

absl::Status DecodeCase::Compare(int32_t sequence_idx, int32_t kv_head, DecodeError* error) const {
  const DeviceSequence& sequence = sequences_[sequence_idx];
  const AttentionShape& shape = options_.shape;
  const int32_t d = shape.head_dim, group = shape.group_size();
  const int64_t head_bytes = DenseHeadBytes(d, options_.kv_type);
  const int32_t num_pages = (sequence.total_len + kPageTokens - 1) / kPageTokens;
  std::vector<std::byte> keys(num_pages * head_bytes), values(num_pages * head_bytes);
  for (int32_t i = 0; i < num_pages; ++i) {
    const std::byte* page = pool_ + PageOffset(PageId{page_table_[sequence.page_table + i]});
    ADAATTN_RETURN_IF_CUDA_ERROR(cudaMemcpy(keys.data() + i * head_bytes,
                                            page + DenseKeyOffset(kv_head, d, options_.kv_type),
                                            head_bytes, cudaMemcpyDeviceToHost));
    ADAATTN_RETURN_IF_CUDA_ERROR(cudaMemcpy(
        values.data() + i * head_bytes, page + DenseValueOffset(shape, kv_head, options_.kv_type),
        head_bytes, cudaMemcpyDeviceToHost));
  }
  const double key_scale = options_.scales ? scales_[sequence.key_scales + kv_head] : 1;
  const double value_scale = options_.scales ? scales_[sequence.value_scales + kv_head] : 1;
  double entropy = 0;
  for (int32_t row = 0; row < sequence.q_len * group; ++row) {
    const KeyRange seen = RowKeys(sequence, row / group);
    const int64_t q_row =
        int64_t{sequence.q_row + row / group} * shape.num_q_heads + kv_head * group + row % group;
    std::vector<double> scores, expected(d, 0.0);
    double top = -std::numeric_limits<double>::infinity(), sum = 0;
    for (int32_t t = seen.begin; t < seen.end; ++t) {
      double dot = 0;
      for (int32_t c = 0; c < d; ++c) {
        dot += double{ReadElement(q_.data(), options_.in_type, q_row * d + c)} *
               ReadElement(keys.data(), options_.kv_type, int64_t{t} * d + c);
      }
      double score = dot * sequence.softmax_scale * key_scale;
      if (options_.softcap > 0) score = options_.softcap * std::tanh(score / options_.softcap);
      scores.push_back(score);
      top = std::max(top, score);
    }
    for (const double score : scores) sum += std::exp(score - top);
    const double lse = scores.empty() ? top : top + std::log(sum);
    for (size_t j = 0; j < scores.size(); ++j) {
      const double share = std::exp(scores[j] - lse);
      entropy += share * (lse - scores[j]);
      for (int32_t c = 0; c < d; ++c) {
        expected[c] += share * value_scale *
                       ReadElement(values.data(), options_.kv_type,
                                   (seen.begin + static_cast<int64_t>(j)) * d + c);
      }
    }
    double off = 0, norm = 0;
    for (int32_t c = 0; c < d; ++c) {
      const double x = ReadElement(out_.data(), options_.out_type, q_row * d + c);
      off += (x - expected[c]) * (x - expected[c]);
      norm += expected[c] * expected[c];
    }
    const double relative = norm > 0 ? std::sqrt(off / norm) : std::sqrt(off);
    error->mean_out += relative;
    KeepWorst(relative, &error->worst_out);
    const double lse_off = lse == lse_[q_row] ? 0 : std::abs(lse - lse_[q_row]);
    KeepWorst(lse_off, &error->worst_lse);
  }
  const HeadDecision& decision = decisions_[sequence_idx * shape.num_kv_heads + kv_head];
  const double entropy_off = std::abs(entropy / (sequence.q_len * group) - decision.entropy);
  KeepWorst(entropy_off, &error->worst_entropy);
  const KeyRange keys_seen = AttendedKeys(sequence);
  const int32_t blocks = (sequence.q_len * group + 8 * row_tiles_ - 1) / (8 * row_tiles_);
  const int64_t tokens = int64_t{keys_seen.end - keys_seen.begin} * blocks;
  error->counted_tokens += decision.dense_tokens;
  error->expected_tokens += tokens;
  error->counted_bytes += decision.key_bytes + decision.value_bytes;
  error->expected_bytes += 2 * tokens * d * DTypeBytes(options_.kv_type);
  return absl::OkStatus();
}

}  // namespace adaattn
