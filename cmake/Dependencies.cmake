# Every third-party package, found once, and the interface targets that all of our code links.

find_package(Threads REQUIRED)
find_package(absl REQUIRED)
find_package(Eigen3 REQUIRED NO_MODULE)
find_package(hwy REQUIRED)
find_package(nlohmann_json REQUIRED)
if(ADAATTN_SERVER)
  find_package(Protobuf CONFIG QUIET)
  if(NOT Protobuf_FOUND)
    find_package(Protobuf REQUIRED)
  endif()
  find_package(gRPC CONFIG REQUIRED)
  find_package(prometheus-cpp REQUIRED)
  find_package(civetweb REQUIRED)
  find_package(spdlog REQUIRED)
endif()
if(ADAATTN_TESTS)
  find_package(GTest REQUIRED)
endif()
if(ADAATTN_BENCHMARKS)
  find_package(benchmark REQUIRED)
endif()

find_program(ADAATTN_CCACHE ccache)
if(ADAATTN_CCACHE)
  set(CMAKE_CXX_COMPILER_LAUNCHER ${ADAATTN_CCACHE})
  set(CMAKE_CUDA_COMPILER_LAUNCHER ${ADAATTN_CCACHE})
endif()

# Warnings are errors, in our own sources only.
add_library(adaattn_warnings INTERFACE)
target_compile_options(adaattn_warnings INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Werror>
  $<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings -Xptxas=-warn-spills>)
if(CMAKE_CXX_COMPILER_ID STREQUAL "Clang")
  target_compile_options(adaattn_warnings INTERFACE
    $<$<COMPILE_LANGUAGE:CXX>:-Wthread-safety -Werror=thread-safety>)
endif()
add_library(adaattn::warnings ALIAS adaattn_warnings)

if(ADAATTN_SANITIZE)
  add_compile_options(-fsanitize=${ADAATTN_SANITIZE} -fno-omit-frame-pointer)
  add_link_options(-fsanitize=${ADAATTN_SANITIZE})
  if(ADAATTN_SANITIZE MATCHES "undefined")
    add_compile_options(-fno-sanitize-recover=undefined)
  endif()
endif()
