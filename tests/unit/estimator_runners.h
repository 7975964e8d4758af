#ifndef ADAATTN_TESTS_UNIT_ESTIMATOR_RUNNERS_H_
#define ADAATTN_TESTS_UNIT_ESTIMATOR_RUNNERS_H_

// The estimators of kernels/cuda/estimators.h on inputs in host memory: their algorithms by threads
// of the host, or all of them on a device.

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "kernels/cuda/device_buffer.h"
#include "kernels/cuda/estimator_entropy.h"
#include "kernels/cuda/estimator_rank.h"
#include "kernels/cuda/estimators.h"
#include "tests/unit/host_team.h"

namespace adaattn {

struct Ranks {
  std::vector<RankEstimate> estimates;
  std::vector<double> energies;
};
struct Entropies {
  std::vector<double> page_lse;
  std::vector<EntropyEstimate> estimates;
};

// Runs estimators whose inputs lie in host memory; `values` has `bytes`.
class EstimatorsUnderTest {
 public:
  virtual ~EstimatorsUnderTest() = default;
  virtual Ranks Run(RankParams params, size_t bytes) = 0;
  // Sums pages first.
  virtual Entropies Run(EntropyParams params) = 0;
};

class EstimatorsByThreads : public EstimatorsUnderTest {
 public:
  Ranks Run(RankParams params, size_t /*bytes*/) override {
    const auto count = static_cast<size_t>(params.x.count);
    Ranks ranks{std::vector<RankEstimate>(count), std::vector<double>(count * params.x.dim)};
    std::vector<double> workspace(RankWorkspaceBytes(params) / 8, std::nan(""));
    params.workspace = reinterpret_cast<std::byte*>(workspace.data());
    params.out = ranks.estimates.data();
    params.energies = ranks.energies.data();
    EXPECT_TRUE(CheckRankParams(params).ok());
    const RankWorkspace work = MakeRankWorkspace(params);
    auto gram = std::make_unique<GramShared>();
    auto shared = std::make_unique<RankShared>();
    for (int32_t matrix = 0; matrix < params.x.count; ++matrix) {
      for (int32_t i = 0; i < work.num_parts * work.tiles; ++i) {
        RunCta([&](const HostTeam& team) {
          GramTile<HostTeam>(params, work, matrix, i / work.tiles, i % work.tiles, team, *gram)
              .Run();
        });
      }
      for (int32_t cta = 0; cta < 2; ++cta) {
        RunCta([&](const HostTeam& team) {
          GramSum<HostTeam>(params, work, matrix).Run(team, cta, 2);
        });
      }
      const bool probes = params.options.method == RankMethod::kHutchinson;
      for (int32_t probe = 0; probe < (probes ? params.options.probes : 1); ++probe) {
        RunCta([&](const HostTeam& team) {
          RankEstimator<HostTeam> estimator(params, work, matrix, team, *shared);
          if (probes) {
            estimator.RunProbe(probe);
          } else {
            estimator.Run();
          }
        });
      }
      if (!probes) continue;
      RankEstimator<HostTeam>(params, work, matrix, HostTeam(), *shared).FinishProbes();
    }
    return ranks;
  }

  Entropies Run(EntropyParams params) override {
    const auto rows = static_cast<size_t>(params.num_rows);
    Entropies result{std::vector<double>(rows * params.page_stride, -HUGE_VAL),
                     std::vector<EntropyEstimate>(rows)};
    std::vector<double> workspace(rows * params.page_stride, std::nan(""));
    params.page_lse = result.page_lse.data();
    params.workspace = workspace.data();
    params.out = result.estimates.data();
    auto shared = std::make_unique<EntropyShared>();
    for (int32_t row = 0; row < params.num_rows; ++row) {
      RunCta([&](const HostTeam& team) {
        EntropyRow<HostTeam> at(params, row, team, *shared);
        at.SumPages(result.page_lse.data());
        team.SyncCta();
        at.Run();
      });
    }
    return result;
  }

 private:
  static void RunCta(const std::function<void(const HostTeam&)>& run) {
    constexpr int32_t kThreads = 3;
    Barrier barrier(kThreads);
    std::vector<std::thread> threads;
    for (int32_t thread = 0; thread < kThreads; ++thread) {
      const HostTeam team{0, 1, thread, kThreads, thread, kThreads, 0, &barrier, &barrier, nullptr};
      threads.emplace_back([team, &run] { run(team); });
    }
    for (std::thread& thread : threads) thread.join();
  }
};

class EstimatorsByDevice : public EstimatorsUnderTest {
 public:
  Ranks Run(RankParams params, size_t bytes) override {
    const auto count = static_cast<size_t>(params.x.count);
    Ranks ranks{std::vector<RankEstimate>(count), std::vector<double>(count * params.x.dim)};
    DeviceBuffer values, pages, workspace, out, energies;
    Upload(params.x.values, bytes, &values);
    if (params.x.pages != nullptr) {
      Upload(params.x.pages, count * PagesOf(params.x.rows) * sizeof(int64_t), &pages);
      params.x.pages = reinterpret_cast<const int64_t*>(pages.data());
    }
    Allocate(RankWorkspaceBytes(params), &workspace);
    Allocate(count * sizeof(RankEstimate), &out);
    Allocate(ranks.energies.size() * sizeof(double), &energies);
    params.x.values = values.data();
    params.workspace = workspace.data();
    params.out = reinterpret_cast<RankEstimate*>(out.data());
    params.energies = reinterpret_cast<double*>(energies.data());
    EXPECT_TRUE(EstimateRanks(params, nullptr).ok());
    Download(out, &ranks.estimates);
    Download(energies, &ranks.energies);
    return ranks;
  }

  Entropies Run(EntropyParams params) override {
    const auto rows = static_cast<size_t>(params.num_rows);
    Entropies result{std::vector<double>(rows * params.page_stride, -HUGE_VAL),
                     std::vector<EntropyEstimate>(rows)};
    DeviceBuffer tokens, scores, page_lse, workspace, out;
    Upload(params.tokens, rows * sizeof(int32_t), &tokens);
    Upload(params.scores, rows * params.score_stride * sizeof(float), &scores);
    Upload(result.page_lse.data(), result.page_lse.size() * sizeof(double), &page_lse);
    Allocate(result.page_lse.size() * sizeof(double), &workspace);
    Allocate(rows * sizeof(EntropyEstimate), &out);
    params.tokens = reinterpret_cast<const int32_t*>(tokens.data());
    params.scores = reinterpret_cast<const float*>(scores.data());
    params.page_lse = reinterpret_cast<const double*>(page_lse.data());
    params.workspace = reinterpret_cast<double*>(workspace.data());
    params.out = reinterpret_cast<EntropyEstimate*>(out.data());
    EXPECT_TRUE(SumPages(params, reinterpret_cast<double*>(page_lse.data()), nullptr).ok());
    EXPECT_TRUE(EstimateEntropies(params, nullptr).ok());
    Download(page_lse, &result.page_lse);
    Download(out, &result.estimates);
    return result;
  }

 private:
  static void Allocate(size_t bytes, DeviceBuffer* buffer) {
    EXPECT_TRUE(buffer->Allocate(static_cast<int64_t>(bytes) + 16).ok());
  }
  static void Upload(const void* from, size_t bytes, DeviceBuffer* buffer) {
    Allocate(bytes, buffer);
    EXPECT_EQ(cudaMemcpy(buffer->data(), from, bytes, cudaMemcpyHostToDevice), cudaSuccess);
  }
  template <class T>
  static void Download(const DeviceBuffer& buffer, std::vector<T>* to) {
    EXPECT_EQ(cudaMemcpy(to->data(), buffer.data(), to->size() * sizeof(T), cudaMemcpyDeviceToHost),
              cudaSuccess);
  }
};

inline bool HasDevice() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
}

}  // namespace adaattn

#endif  // ADAATTN_TESTS_UNIT_ESTIMATOR_RUNNERS_H_
