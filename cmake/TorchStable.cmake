# Defines the target torch_stable: the headers of PyTorch's stable ABI, and libtorch_cpu, which has
# the C functions that the headers call.
#
# LK_TORCH_INCLUDE  list of include directories
# LK_TORCH_LIBRARY  path of libtorch_cpu.so
# Where they are not set, the Python interpreter tells them. find_package(Torch) is not used, because
# it adds CUDA and every library of libtorch, and the binary needs only libtorch_cpu.

if(NOT LK_TORCH_INCLUDE OR NOT LK_TORCH_LIBRARY)
  if(NOT Python_EXECUTABLE)
    find_program(Python_EXECUTABLE NAMES python3 python REQUIRED)
  endif()
  # This finds the package without importing it, because importing torch takes seconds.
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c
            "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"
    OUTPUT_VARIABLE LK_TORCH_ROOT
    OUTPUT_STRIP_TRAILING_WHITESPACE
    ERROR_QUIET
    RESULT_VARIABLE LK_TORCH_MISSING)
  if(LK_TORCH_MISSING)
    message(FATAL_ERROR "PyTorch is not installed for ${Python_EXECUTABLE}; install torch >= 2.11")
  endif()
endif()
if(NOT LK_TORCH_INCLUDE)
  set(LK_TORCH_INCLUDE ${LK_TORCH_ROOT}/include)
endif()
if(NOT LK_TORCH_LIBRARY)
  set(LK_TORCH_LIBRARY ${LK_TORCH_ROOT}/lib/libtorch_cpu.so)
endif()

set(LK_TORCH_FOUND FALSE)
foreach(dir IN LISTS LK_TORCH_INCLUDE)
  if(EXISTS ${dir}/torch/csrc/stable/library.h)
    set(LK_TORCH_FOUND TRUE)
  endif()
endforeach()
if(NOT LK_TORCH_FOUND)
  message(FATAL_ERROR "No torch/csrc/stable/library.h under ${LK_TORCH_INCLUDE}; "
                      "PyTorch >= 2.11 is needed")
endif()

add_library(torch_stable INTERFACE)
target_include_directories(torch_stable SYSTEM INTERFACE ${LK_TORCH_INCLUDE})
# Exceptions of these headers name their files.
foreach(dir IN LISTS LK_TORCH_INCLUDE)
  target_compile_options(torch_stable INTERFACE -ffile-prefix-map=${dir}=torch)
endforeach()
target_link_libraries(torch_stable INTERFACE ${LK_TORCH_LIBRARY})
# A binary that was built with any newer PyTorch also loads with 2.11 and later.
target_compile_definitions(torch_stable INTERFACE TORCH_TARGET_VERSION=0x020b000000000000)
