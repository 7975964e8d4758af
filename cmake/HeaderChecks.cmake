# Compiles every header of kernels/ alone, twice included, with the plain C++ compiler: whoever includes
# one needs nothing before it, and no device compiler.

find_path(ADAATTN_CUDA_INCLUDE cuda_runtime.h HINTS ENV CUDA_HOME PATHS /usr/local/cuda PATH_SUFFIXES include)
mark_as_advanced(ADAATTN_CUDA_INCLUDE)

# All of them, so globbed: a list would let a new header slip through.
file(GLOB_RECURSE headers RELATIVE ${PROJECT_SOURCE_DIR} CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/kernels/*.h)
# What Highway compiles once per SIMD target stands alone only inside its foreach_target.
list(FILTER headers EXCLUDE REGEX "-inl\\.h$")
if(NOT ADAATTN_CUDA_INCLUDE)
  list(FILTER headers EXCLUDE REGEX "^kernels/cuda/")  # They may name the runtime's types.
endif()

set(sources "")
foreach(header IN LISTS headers)
  string(REGEX REPLACE "[/.]" "_" name ${header})
  set(source ${CMAKE_CURRENT_BINARY_DIR}/header_checks/${name}.cc)
  file(CONFIGURE OUTPUT ${source} CONTENT "#include \"${header}\"\n#include \"${header}\"\n")
  list(APPEND sources ${source})
endforeach()

add_library(adaattn_header_checks OBJECT ${sources})
target_compile_options(adaattn_header_checks PRIVATE -O0 -g0)
target_link_libraries(adaattn_header_checks PRIVATE adaattn::kernels Eigen3::Eigen hwy::hwy adaattn::warnings)
if(ADAATTN_CUDA_INCLUDE)
  target_include_directories(adaattn_header_checks SYSTEM PRIVATE ${ADAATTN_CUDA_INCLUDE})
endif()
