# Which instruction sets to build: LOWBIT_CHOSEN; the flags and macros of each in LOWBIT_FLAGS_<set>, LOWBIT_MACROS_<set>;
# the set that it adds tiles to in LOWBIT_BASE_<set>.
include(CheckCXXSourceCompiles)

# lowbit_set(NAME FLAGS SOURCE): offers a set if the compiler and its assembler take an instruction of it.
function(lowbit_set name flags source)
  set(CMAKE_REQUIRED_FLAGS "${flags}")
  set(CMAKE_REQUIRED_QUIET ON)
  set(CMAKE_TRY_COMPILE_TARGET_TYPE STATIC_LIBRARY)
  check_cxx_source_compiles("${source}" LOWBIT_CAN_${name})
  if(LOWBIT_CAN_${name})
    list(APPEND LOWBIT_CAN ${name})
    set(LOWBIT_CAN ${LOWBIT_CAN} PARENT_SCOPE)
    separate_arguments(flags UNIX_COMMAND "${flags}")
    set(LOWBIT_FLAGS_${name} ${flags} PARENT_SCOPE)
  elseif(NOT LOWBIT_ISAS OR name IN_LIST LOWBIT_ISAS)
    message(NOTICE "lowbit: no ${name} kernels: ${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION} does not compile \
for them (${flags}); with a newer compiler they are built")
  endif()
endfunction()

set(LOWBIT_CAN portable)
set(LOWBIT_FLAGS_portable "")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  set(avx2 "-mavx2 -mfma -mf16c -mbmi -mbmi2 -mlzcnt -mpopcnt")
  set(avx512 "${avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mprefer-vector-width=512")
  lowbit_set(avx2 "${avx2}" "#include <immintrin.h>
    __m256 f(__m256 a, __m128i h) { return _mm256_fmadd_ps(a, a, _mm256_cvtph_ps(h)); }")
  lowbit_set(avx512 "${avx512}" "#include <immintrin.h>
    __m512i f(__m512i a) { return _mm512_dpbusd_epi32(a, a, a); }")
  set(LOWBIT_BASE_amx avx512)
  lowbit_set(amx "${avx512} -mamx-tile -mamx-int8" "#include <immintrin.h>
    __m512i f(__m512i a, const void* p) { _tile_loadd(0, p, 64); _tile_dpbssd(1, 0, 2); return _mm512_dpbusd_epi32(a, a, a); }")
  if(LOWBIT_EMULATE)
    # Tiles in plain C++ beside the vectors of AVX2: compiled in a fraction of the time that SIMDe's take.
    set(LOWBIT_BASE_amx_emulated avx2)
    lowbit_set(amx_emulated "${avx2}" "int f() { return 0; }")
    # -O1 compiles in a quarter of the time; speed is not what it is for. GCC 12 ends with an error of its own where it
    # takes SIMDe's unions apart (tree-sra).
    lowbit_set(avx512_emulated "${avx2} -O1 -fno-tree-sra" "#include <simde/x86/avx512.h>
      simde__m512i f(simde__m512i a) { return simde_mm512_dpbusd_epi32(a, a, a); }")
  endif()
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64|ARM64)$")
  lowbit_set(neon "-march=armv8.2-a+dotprod" "#include <arm_neon.h>
    int32x4_t f(int32x4_t s, int8x16_t a) { return vdotq_laneq_s32(s, a, a, 0); }")
endif()

set(LOWBIT_CHOSEN ${LOWBIT_ISAS})
if(NOT LOWBIT_CHOSEN)
  set(LOWBIT_CHOSEN ${LOWBIT_CAN})
endif()
foreach(isa IN LISTS LOWBIT_CHOSEN)
  if(NOT isa IN_LIST LOWBIT_CAN)
    list(JOIN LOWBIT_CAN ", " can)
    message(FATAL_ERROR " lowbit: instruction set ${isa} cannot be built here; these can: ${can}")
  endif()
  string(REGEX REPLACE "_emulated$" "" set "${isa}")
  if(NOT set STREQUAL isa)
    set(LOWBIT_MACROS_${isa} LOWBIT_EMULATE=1)
  endif()
  if(DEFINED LOWBIT_BASE_${isa})
    list(APPEND LOWBIT_MACROS_${isa} LOWBIT_TILES=1)
    set(set ${LOWBIT_BASE_${isa}})
  endif()
  string(TOUPPER "LOWBIT_ISA_${set}=1" macro)
  list(APPEND LOWBIT_MACROS_${isa} ${macro})
endforeach()
