// What is asked of the library before anything else: its version, and which of the compiled levels this processor runs.
#define EXPORT_INT extern "C" __attribute__((visibility("default"))) int

// What the functions take and mean; `VERSION` in library.py.
EXPORT_INT sb_version() { return 4; }

EXPORT_INT sb_has_baseline() { return 1; }

EXPORT_INT sb_has_avx2() {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
    return 0;
#endif
}

EXPORT_INT sb_has_avx512() {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
#else
    return 0;
#endif
}
