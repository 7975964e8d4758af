#ifndef ADAATTN_TESTS_SUPPORT_TEST_BACKEND_H_
#define ADAATTN_TESTS_SUPPORT_TEST_BACKEND_H_

#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>
#include <string>

namespace adaattn {

// The backend under test: the environment's ADAATTN_TEST_BACKEND, or "cpu".
inline std::string TestBackend() {
  const char* name = std::getenv("ADAATTN_TEST_BACKEND");
  return name == nullptr ? "cpu" : name;
}

// A tuning file for `device` where the environment's ADAATTN_TEST_CONCLUDE_PAGES says another
// CudaTuning::conclude_pages than the default (0: no step ends with one launch, however few its
// heads), else "".
inline std::string TestTuningFile(const std::string& device) {
  const char* pages = std::getenv("ADAATTN_TEST_CONCLUDE_PAGES");
  if (pages == nullptr) return "";
  std::string path = ::testing::TempDir() + "/adaattn_test_tuning.json";
  std::ofstream(path) << R"({"version": 1, "devices": [{"device": ")" << device
                      << R"(", "exact_ctas_per_sm": 2, "progressive_cta_percent": 100,)"
                      << R"("conclude_pages": )" << pages
                      << R"(, "crossovers": [], "provenance": {}}]})";
  return path;
}

}  // namespace adaattn

#endif  // ADAATTN_TESTS_SUPPORT_TEST_BACKEND_H_
