// What belongs to no level: the library's version, which of the compiled levels this processor runs, calls made again.
#include <stdint.h>

#define EXPORT extern "C" __attribute__((visibility("default")))
#define EXPORT_INT EXPORT int

// What the functions take and mean; `VERSION` in library.py.
EXPORT_INT sb_version() { return 6; }

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

// A call that was recorded: one of the functions that take their arguments as words, and the words.
struct Replayed {
    void (*function)(const void*);
    const void* words;
};

// Calls made again, one after another.
EXPORT void sb_replay(const Replayed* calls, int64_t count) {
    for (int64_t i = 0; i < count; i++) calls[i].function(calls[i].words);
}
