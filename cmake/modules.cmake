# One module an instruction set. Sources are found by themselves: a kernel is backends/cpu/NAME.cpp with a bind_NAME().
set(cpu "${CMAKE_CURRENT_SOURCE_DIR}/src/lowbit/backends/cpu")
file(GLOB kernels CONFIGURE_DEPENDS "${cpu}/*.cpp")
set(binds "// Made by cmake/modules.cmake: every kernel source, by name.\n")
foreach(source IN LISTS kernels)
  get_filename_component(name "${source}" NAME_WE)
  string(APPEND binds "LOWBIT_BIND(${name})\n")
endforeach()
file(CONFIGURE OUTPUT "${CMAKE_CURRENT_BINARY_DIR}/generated/binds.inc" CONTENT "${binds}" @ONLY)

# Those that multiply tiles, as a pattern: what includes native/amx.h, itself or through other headers.
file(GLOB headers "${cpu}/native/*.h")
set(with_tiles "amx")
set(before "")
while(NOT before STREQUAL with_tiles)
  set(before "${with_tiles}")
  foreach(header IN LISTS headers)
    get_filename_component(name "${header}" NAME_WE)
    file(STRINGS "${header}" found REGEX "^#include \"(${with_tiles})\\.h\"")
    if(found AND NOT name MATCHES "^(${with_tiles})$")
      string(APPEND with_tiles "|${name}")
    endif()
  endforeach()
endwhile()
set(tile_kernels "")
foreach(source IN LISTS kernels)
  file(STRINGS "${source}" found REGEX "^#include \"native/(${with_tiles})\\.h\"")
  if(found)
    list(APPEND tile_kernels "${source}")
  endif()
endforeach()
list(TRANSFORM tile_kernels REPLACE ".*/(.*)\\.cpp$" "\\1" OUTPUT_VARIABLE tile_names)
list(JOIN tile_names "|" tile_names)

# No -ffast-math: infinities and NaN mean something, and sums keep their order. What is given up here cannot change a
# result: errno and floating-point traps. No contraction: a kernel says fma where it means fma.
set(flags -Wall -Wextra -fno-math-errno -fno-trapping-math -ffp-contract=off -fvisibility=hidden)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  # No vector crosses the border of a module; and GCC's own vector headers look uninitialized to it.
  list(APPEND flags -Wno-psabi -Wno-uninitialized -Wno-maybe-uninitialized)
endif()
if(LOWBIT_SANITIZE)
  set(sanitize -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g)
  list(APPEND flags ${sanitize} -U_FORTIFY_SOURCE -UNDEBUG -D_GLIBCXX_ASSERTIONS)
  set(strip NOSTRIP)
endif()

list(JOIN LOWBIT_CHOSEN "\n" names)
file(WRITE "${CMAKE_CURRENT_BINARY_DIR}/generated/sets" "${names}\n") # scripts/build_native reads it
if(NOT LOWBIT_MODULES)
  return()
endif()

# Only the entry point is visible, so that nothing of one set's code can be taken for another's.
file(WRITE "${CMAKE_CURRENT_BINARY_DIR}/generated/exports.map" "{ global: PyInit_*; local: *; };\n")

# What the machine can run is asked of a module that any machine can run.
nanobind_add_module(_machine NB_STATIC STABLE_ABI FREE_THREADED NOMINSIZE ${strip} NB_DOMAIN lowbit "${cpu}/native/machine.cpp")

set(modules _machine)
foreach(isa IN LISTS LOWBIT_CHOSEN)
  set(module _native_${isa})
  set(sources ${kernels} "${cpu}/native/parallel.cpp")
  if("${LOWBIT_BASE_${isa}}" IN_LIST LOWBIT_CHOSEN) # all but the tiles' kernels is compiled already
    set(objects "$<TARGET_OBJECTS:_native_${LOWBIT_BASE_${isa}}>")
    set(sources ${tile_kernels} "$<FILTER:${objects},EXCLUDE,/(${tile_names}|module)\\.cpp>")
  endif()
  nanobind_add_module(${module} NB_STATIC STABLE_ABI FREE_THREADED NOMINSIZE ${strip} NB_DOMAIN lowbit
    ${sources} "${cpu}/native/module.cpp")
  target_include_directories(${module} PRIVATE "${cpu}" "${CMAKE_CURRENT_BINARY_DIR}/generated")
  target_compile_definitions(${module} PRIVATE LOWBIT_MODULE=${module} LOWBIT_ISA_NAME="${isa}" ${LOWBIT_MACROS_${isa}})
  target_compile_options(${module} PRIVATE ${LOWBIT_FLAGS_${isa}})
  target_link_libraries(${module} PRIVATE ${CMAKE_DL_LIBS})
  list(APPEND modules ${module})
endforeach()

foreach(module IN LISTS modules)
  target_compile_options(${module} PRIVATE ${flags})
  target_link_options(${module} PRIVATE ${sanitize})
  if(CMAKE_SYSTEM_NAME STREQUAL "Linux")
    target_link_options(${module} PRIVATE "-Wl,--version-script=${CMAKE_CURRENT_BINARY_DIR}/generated/exports.map")
  endif()
  if(SKBUILD_STATE STREQUAL "editable") # the sources are what is imported, so the modules lie beside them
    install(TARGETS ${module} LIBRARY DESTINATION "${cpu}")
  else()
    install(TARGETS ${module} LIBRARY DESTINATION lowbit/backends/cpu)
  endif()
endforeach()
