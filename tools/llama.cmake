# Read by CMake at the beginning of llama.cpp's own project (CMAKE_PROJECT_<PROJECT-NAME>_INCLUDE, cmake-variables(7)).
# llama-cpp-python turns its library for chat programs on for good; nothing of the Python package loads it, and it is 53 of 127 files.
set(LLAMA_BUILD_COMMON OFF)
# No AMX: GCC 12, Debian's, drops what is stored into the tile configuration before it is loaded, and quantized models die of SIGILL on processors that
# have these tiles (github.com/ggml-org/llama.cpp/pull/26954, open). A compiler for another processor does not know the flag, nor does an old one.
include(CheckCXXCompilerFlag)
check_cxx_compiler_flag(-mno-amx-int8 WHIMBREL_KNOWS_AMX)
if(WHIMBREL_KNOWS_AMX)
    add_compile_options(-mno-amx-int8)
endif()
