#ifndef ADAATTN_TESTS_SUPPORT_TEST_BACKEND_H_
#define ADAATTN_TESTS_SUPPORT_TEST_BACKEND_H_

#include <cstdlib>
#include <string>

namespace adaattn {

// The backend under test: the environment's ADAATTN_TEST_BACKEND, or "cpu".
inline std::string TestBackend() {
  const char* name = std::getenv("ADAATTN_TEST_BACKEND");
  return name == nullptr ? "cpu" : name;
}

}  // namespace adaattn

#endif  // ADAATTN_TESTS_SUPPORT_TEST_BACKEND_H_
