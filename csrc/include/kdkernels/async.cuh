// Asynchronous copies of compute capability 9.0 and later: barriers in shared memory (mbarrier) that count arrivals and
// bytes, bulk copies that one thread starts for its block, and stores into the shared memory of another block of the
// cluster. On older GPUs none of it may be reached. Framework-free.
#pragma once

#include "device.cuh"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define KDK_SM90(...)
#else
#define KDK_SM90(...) __VA_ARGS__
#endif

namespace kdk {
namespace cuda {

// Addresses are those of shared memory, as shared_address gives them.
__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
  KDK_SM90(asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");)
}
// Makes the initialised barriers known to the cluster and to asynchronous copies; a barrier of the cluster must follow.
__device__ __forceinline__ void barriers_are_made() {
  KDK_SM90(asm volatile("fence.mbarrier_init.release.cluster;" :: : "memory");)
}
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  KDK_SM90(asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");)
}
// Arrives, and says how many bytes of asynchronous writes the phase has to wait for.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
  KDK_SM90(asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
                        "r"(bytes) : "memory");)
}
// Waits until the phase of this parity is complete. CLUSTER: other blocks take part in it.
template <bool CLUSTER>
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  uint32_t done;
  do {
    if (CLUSTER) {
      asm volatile(
          "{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; "
          "}"
          : "=r"(done)
          : "r"(barrier), "r"(parity)
          : "memory");
    } else {
      asm volatile(
          "{ .reg .pred p; mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
          : "=r"(done)
          : "r"(barrier), "r"(parity)
          : "memory");
    }
  } while (!done);
#endif
}

// bytes, and both addresses, are multiples of 16.
__device__ __forceinline__ void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  KDK_SM90(
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                   "l"(from), "r"(bytes), "r"(barrier) : "memory");)
}
__device__ __forceinline__ void bulk_store(void* to, uint32_t from, uint32_t bytes) {
  KDK_SM90(
      asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\ncp.async.bulk.commit_group;" ::"l"(to),
                   "r"(from), "r"(bytes) : "memory");)
}
// The calling thread's bulk stores have read their source, or are complete.
__device__ __forceinline__ void bulk_stores_have_read() {
  KDK_SM90(asm volatile("cp.async.bulk.wait_group.read 0;" :: : "memory");)
}
__device__ __forceinline__ void bulk_stores_done() {
  KDK_SM90(asm volatile("cp.async.bulk.wait_group 0;" :: : "memory");)
}
// Bulk copies see what was written to shared memory before.
__device__ __forceinline__ void publish_to_bulk_copies() {
  KDK_SM90(asm volatile("fence.proxy.async.shared::cta;" :: : "memory");)
}

// The same place in the shared memory of another block of the cluster.
__device__ __forceinline__ uint32_t in_block(uint32_t address, uint32_t block) {
  uint32_t there = address;
  KDK_SM90(asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(block));)
  return there;
}
// 16 bytes into another block, counted by a barrier there.
__device__ __forceinline__ void store_async(uint32_t to, const uint4& x, uint32_t barrier) {
  KDK_SM90(
      asm volatile(
          "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
          "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w), "r"(barrier) : "memory");)
}

// Two halves of the barrier of a cluster. Relaxed: nothing that was written before is published, which a fence or
// nobody's need of it has to make good.
__device__ __forceinline__ void cluster_arrive_relaxed() {
  KDK_SM90(asm volatile("barrier.cluster.arrive.relaxed.aligned;" :: : "memory");)
}
__device__ __forceinline__ void cluster_wait() {
  KDK_SM90(asm volatile("barrier.cluster.wait.acquire.aligned;" :: : "memory");)
}

}  // namespace cuda
}  // namespace kdk
