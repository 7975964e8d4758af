#include "kernels/format/basis.h"

#include <Eigen/Dense>
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "absl/strings/str_cat.h"

namespace adaattn {
namespace {

using RowMatrix = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

absl::Status CheckFinite(absl::Span<const float> values, absl::string_view field) {
  for (size_t i = 0; i < values.size(); ++i) {
    if (!IsFiniteFloat(values[i])) {
      return absl::InvalidArgumentError(
          absl::StrCat(field, "[", i, "] is ", values[i], "; must be finite"));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckSize(absl::Span<const float> values, absl::string_view field, size_t expected) {
  if (values.size() == expected) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(field, " has ", values.size(), " elements; must have ", expected));
}

absl::Status CheckRows(absl::Span<const float> values, absl::string_view field, int32_t head_dim) {
  if (values.size() % static_cast<size_t>(head_dim) == 0) return CheckFinite(values, field);
  return absl::InvalidArgumentError(absl::StrCat(
      field, " has ", values.size(), " elements; must be a multiple of head_dim ", head_dim));
}

RowMatrix ToMatrix(absl::Span<const float> rows, int32_t head_dim) {
  using FloatMatrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  const auto num_rows = static_cast<Eigen::Index>(rows.size()) / head_dim;
  return Eigen::Map<const FloatMatrix>(rows.data(), num_rows, head_dim).cast<double>();
}

// E[(x B)_c^2] over the rows x whose mean outer product is `moment`.
Eigen::VectorXd EnergyByRank(const RowMatrix& moment, const RowMatrix& rotation) {
  return (moment * rotation).cwiseProduct(rotation).colwise().sum().transpose().cwiseMax(0.0);
}

// Makes the sign of every column a property of the column.
void FixSigns(RowMatrix* rotation) {
  for (Eigen::Index c = 0; c < rotation->cols(); ++c) {
    Eigen::Index row = 0;
    rotation->col(c).cwiseAbs().maxCoeff(&row);
    if ((*rotation)(row, c) < 0) rotation->col(c) *= -1.0;
  }
}

}  // namespace

absl::StatusOr<Basis> FitBasis(int32_t head_dim, absl::Span<const float> keys,
                               absl::Span<const float> queries) {
  if (keys.empty()) return absl::InvalidArgumentError("keys is empty; must have at least one row");
  if (absl::Status status = CheckRows(keys, "keys", head_dim); !status.ok()) return status;
  if (absl::Status status = CheckRows(queries, "queries", head_dim); !status.ok()) return status;

  RowMatrix centred = ToMatrix(keys, head_dim);
  const Eigen::RowVectorXd mean = centred.colwise().mean();
  // Subtract the mean as it is stored, so that the fit sees what sealing will see.
  const Eigen::RowVectorXf stored_mean = mean.cast<float>();
  centred.rowwise() -= stored_mean.cast<double>();
  const RowMatrix moment = centred.transpose() * centred / static_cast<double>(centred.rows());
  const Eigen::SelfAdjointEigenSolver<RowMatrix> solver(moment);
  if (solver.info() != Eigen::Success) {
    return absl::InternalError("the eigenvalue iteration of the key moments did not converge");
  }
  RowMatrix rotation = solver.eigenvectors().rowwise().reverse();  // largest eigenvalue first
  Eigen::VectorXd weight = EnergyByRank(moment, rotation);
  if (!queries.empty()) {
    const RowMatrix q = ToMatrix(queries, head_dim);
    const RowMatrix query_moment = q.transpose() * q / static_cast<double>(q.rows());
    weight = weight.cwiseProduct(EnergyByRank(query_moment, rotation));
  }
  std::vector<Eigen::Index> order(static_cast<size_t>(head_dim));
  std::iota(order.begin(), order.end(), Eigen::Index{0});
  std::stable_sort(order.begin(), order.end(),
                   [&weight](Eigen::Index a, Eigen::Index b) { return weight(a) > weight(b); });
  RowMatrix ordered(head_dim, head_dim);
  for (int32_t c = 0; c < head_dim; ++c) {
    ordered.col(c) = rotation.col(order[static_cast<size_t>(c)]);
  }
  FixSigns(&ordered);

  Basis basis;
  basis.head_dim = head_dim;
  basis.mean.assign(stored_mean.data(), stored_mean.data() + head_dim);
  basis.rotation.resize(static_cast<size_t>(head_dim) * head_dim);
  std::transform(ordered.data(), ordered.data() + ordered.size(), basis.rotation.begin(),
                 [](double value) { return static_cast<float>(value); });
  const Eigen::VectorXd energy = EnergyByRank(moment, ordered);
  basis.energy.resize(static_cast<size_t>(head_dim));
  std::transform(energy.data(), energy.data() + head_dim, basis.energy.begin(),
                 [](double value) { return static_cast<float>(value); });
  return basis;
}

absl::StatusOr<Basis> CheckBasis(int32_t head_dim, absl::Span<const float> mean,
                                 absl::Span<const float> rotation) {
  const auto d = static_cast<size_t>(head_dim);
  if (absl::Status status = CheckSize(mean, "mean", d); !status.ok()) return status;
  if (absl::Status status = CheckSize(rotation, "basis", d * d); !status.ok()) return status;
  if (absl::Status status = CheckFinite(mean, "mean"); !status.ok()) return status;
  if (absl::Status status = CheckFinite(rotation, "basis"); !status.ok()) return status;
  const RowMatrix matrix = ToMatrix(rotation, head_dim);
  const RowMatrix gram = matrix.transpose() * matrix;
  for (Eigen::Index a = 0; a < gram.rows(); ++a) {
    for (Eigen::Index b = 0; b <= a; ++b) {
      const double expected = a == b ? 1.0 : 0.0;
      if (std::abs(gram(a, b) - expected) <= kOrthonormalTolerance) continue;
      return absl::InvalidArgumentError(
          absl::StrCat("basis is not orthonormal: columns ", b, " and ", a, " have product ",
                       gram(a, b), "; must be ", expected, " within ", kOrthonormalTolerance));
    }
  }
  Basis basis;
  basis.head_dim = head_dim;
  basis.mean.assign(mean.begin(), mean.end());
  basis.rotation.assign(rotation.begin(), rotation.end());
  basis.energy.assign(d, 0.0f);
  return basis;
}

void WriteBasis(const Basis& basis, const AttentionShape& shape, int32_t kv_head,
                std::byte* block) {
  const int32_t d = shape.head_dim;
  const BasisLayout layout = MakeBasisLayout(shape);
  std::byte* const head = block + kv_head * layout.head_bytes;
  RowMatrix query(d, d);
  for (int64_t i = 0; i < int64_t{d} * d; ++i) {
    const Fp16 rounded = ToFp16(basis.rotation[static_cast<size_t>(i)]);
    std::memcpy(head + layout.query_basis + 2 * i, &rounded, sizeof(rounded));
    query.data()[i] = ToFloat(rounded);
  }
  const RowMatrix key = query.inverse().transpose();
  for (int64_t i = 0; i < int64_t{d} * d; ++i) {
    const auto value = static_cast<float>(key.data()[i]);
    std::memcpy(head + layout.key_basis + 4 * i, &value, sizeof(value));
  }
  const auto bytes = static_cast<size_t>(d) * sizeof(float);
  std::memcpy(head + layout.mean, basis.mean.data(), bytes);
  std::memcpy(head + layout.energy, basis.energy.data(), bytes);
  std::memcpy(head + layout.factors, &basis.value_factors, sizeof(basis.value_factors));
}

BasisView ViewBasis(const std::byte* block, const AttentionShape& shape, int32_t kv_head) {
  const BasisLayout layout = MakeBasisLayout(shape);
  const std::byte* const head = block + kv_head * layout.head_bytes;
  BasisView view;
  view.mean = reinterpret_cast<const float*>(head + layout.mean);
  view.query_basis = reinterpret_cast<const Fp16*>(head + layout.query_basis);
  view.key_basis = reinterpret_cast<const float*>(head + layout.key_basis);
  view.energy = reinterpret_cast<const float*>(head + layout.energy);
  view.value_factors = reinterpret_cast<const ValueFactors*>(head + layout.factors);
  return view;
}

void RotateKey(const BasisView& basis, int32_t head_dim, const float* key, float* out) {
  std::fill_n(out, head_dim, 0.0f);
  for (int32_t c = 0; c < head_dim; ++c) {
    const float centred = key[c] - basis.mean[c];
    const float* const row = basis.key_basis + int64_t{c} * head_dim;
    for (int32_t r = 0; r < head_dim; ++r) out[r] += centred * row[r];
  }
}

void RestoreKey(const BasisView& basis, int32_t head_dim, const float* rotated, float* out) {
  for (int32_t c = 0; c < head_dim; ++c) {
    const Fp16* const row = basis.query_basis + int64_t{c} * head_dim;
    float sum = basis.mean[c];
    for (int32_t r = 0; r < head_dim; ++r) sum += rotated[r] * ToFloat(row[r]);
    out[c] = sum;
  }
}

void RotateQuery(const BasisView& basis, int32_t head_dim, const float* query, float* out) {
  std::fill_n(out, head_dim, 0.0f);
  for (int32_t c = 0; c < head_dim; ++c) {
    const Fp16* const row = basis.query_basis + int64_t{c} * head_dim;
    for (int32_t r = 0; r < head_dim; ++r) out[r] += query[c] * ToFloat(row[r]);
  }
}

float QueryMeanScore(const BasisView& basis, int32_t head_dim, const float* query) {
  float sum = 0.0f;
  for (int32_t c = 0; c < head_dim; ++c) sum += query[c] * basis.mean[c];
  return sum;
}

float DriftRatio(const BasisView& basis, int32_t head_dim, absl::Span<const float> rotated) {
  double fitted = 0.0, seen = 0.0;
  for (int32_t r = head_dim / 2; r < head_dim; ++r) fitted += basis.energy[r];
  if (fitted <= 0.0 || rotated.empty()) return 1.0f;
  const auto num_rows = static_cast<int64_t>(rotated.size()) / head_dim;
  for (int64_t row = 0; row < num_rows; ++row) {
    for (int32_t r = head_dim / 2; r < head_dim; ++r) {
      const double value = rotated[static_cast<size_t>(row * head_dim + r)];
      seen += value * value;
    }
  }
  return static_cast<float>(seen / static_cast<double>(num_rows) / fitted);
}

}  // namespace adaattn
