// Symbols of newer releases of glibc and libstdc++, in terms of those that manylinux_2_28 has: scripts/wheel links this
// into the library with -Wl,--wrap. A compiler of that age needs none of it, and no symbol is wrapped that is not asked
// for.
#include <cmath>
#include <ios>
#include <new>
#include <sstream>

// The same functions but for errno, under the version that every glibc has.
#define KDK_OLD(name) __asm__(".symver kdk_old_" #name "," #name "@GLIBC_2.2.5")
#define KDK_MATHS_1(name)                   \
  extern "C" double kdk_old_##name(double); \
  KDK_OLD(name);                            \
  extern "C" double __wrap_##name(double x) { return kdk_old_##name(x); }

KDK_MATHS_1(exp)
KDK_MATHS_1(exp2)
KDK_MATHS_1(log)
KDK_MATHS_1(log2)
extern "C" double kdk_old_pow(double, double);
KDK_OLD(pow);
extern "C" double __wrap_pow(double x, double y) { return kdk_old_pow(x, y); }

// In libdl before glibc 2.34; libtorch brings that along.
extern "C" void* kdk_old_dlopen(const char*, int);
KDK_OLD(dlopen);
extern "C" void* __wrap_dlopen(const char* name, int flags) { return kdk_old_dlopen(name, flags); }
extern "C" void* kdk_old_dlsym(void*, const char*);
KDK_OLD(dlsym);
extern "C" void* __wrap_dlsym(void* handle, const char* name) { return kdk_old_dlsym(handle, name); }
extern "C" int kdk_old_dlclose(void*);
KDK_OLD(dlclose);
extern "C" int __wrap_dlclose(void* handle) { return kdk_old_dlclose(handle); }
extern "C" int kdk_old_dladdr(const void*, void*);
KDK_OLD(dladdr);
extern "C" int __wrap_dladdr(const void* address, void* info) { return kdk_old_dladdr(address, info); }

// "There may be other threads": reference counts are then always atomic.
extern "C" char __wrap___libc_single_threaded;
char __wrap___libc_single_threaded = 0;

// Of libstdc++ 9 and 11.
extern "C" [[noreturn]] void __wrap__ZSt28__throw_bad_array_new_lengthv() { throw std::bad_array_new_length(); }
extern "C" void __wrap__ZNSt7__cxx1119basic_ostringstreamIcSt11char_traitsIcESaIcEEC1Ev(void* self) {
  new (self) std::ostringstream(std::ios_base::out);
}
extern "C" void __wrap__ZNSt7__cxx1118basic_stringstreamIcSt11char_traitsIcESaIcEEC1Ev(void* self) {
  new (self) std::stringstream(std::ios_base::in | std::ios_base::out);
}
