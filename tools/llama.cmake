# Read by CMake at the beginning of llama.cpp's own project (CMAKE_PROJECT_<PROJECT-NAME>_INCLUDE, cmake-variables(7)).
# llama-cpp-python turns its library for chat programs on for good; nothing of the Python package loads it, and it is 53 of 127 files.
set(LLAMA_BUILD_COMMON OFF)
