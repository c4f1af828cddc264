// A CUDA runtime that launches nothing and writes down what it was asked: linked with the objects that nvcc made, it
// shows every launch of csrc/*.cu on a machine without a GPU. Device 0 is an sm_80, device 1 an sm_90; which of the two
// is current is remembered as the true runtime does.
//
// The log has a line a call: "<call> <current device> <key>=<value> ...".

#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>

#include "../row_algorithm.h"

namespace {

int current = 0;
bool failing = false;
std::string written;

std::map<const void*, std::string>& kernels() {
  static std::map<const void*, std::string> known;
  return known;
}

void note(const std::string& call, const std::string& rest) {
  written += call + " " + std::to_string(current) + " " + rest + "\n";
}

std::string field(const char* key, unsigned long long value) {
  return std::string(key) + "=" + std::to_string(value) + " ";
}

std::string address(const char* key, const void* pointer) {
  return field(key, reinterpret_cast<unsigned long long>(pointer));
}

bool has(const std::string& name, const char* part) { return name.find(part) != std::string::npos; }

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED const char* stand_in_log() { return written.c_str(); }
EXPORTED int stand_in_current() { return current; }
// Forgets the log and makes device 0 current; launches fail from here on, or do not.
EXPORTED void stand_in_begin(int fails) { written.clear(), current = 0, failing = fails != 0; }

extern "C" {

cudaError_t CUDARTAPI cudaGetDevice(int* device) { return *device = current, cudaSuccess; }
cudaError_t CUDARTAPI cudaSetDevice(int device) { return current = device, cudaSuccess; }
cudaError_t CUDARTAPI cudaGetLastError() { return cudaSuccess; }
const char* CUDARTAPI cudaGetErrorName(cudaError_t) { return "cudaErrorStandIn"; }
const char* CUDARTAPI cudaGetErrorString(cudaError_t) { return "asked to fail"; }

cudaError_t CUDARTAPI cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (attribute == cudaDevAttrComputeCapabilityMajor) *value = device == 1 ? 9 : 8;
  if (attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin) *value = device == 1 ? 232448 : 166912;
  if (attribute == cudaDevAttrMultiProcessorCount) *value = device == 1 ? 132 : 108;
  return cudaSuccess;
}

cudaError_t CUDARTAPI cudaFuncSetAttribute(const void*, cudaFuncAttribute, int value) {
  return note("attribute", field("shared", unsigned(value))), cudaSuccess;
}

cudaError_t CUDARTAPI cudaOccupancyMaxActiveClusters(int* clusters, const void*, const cudaLaunchConfig_t*) {
  return *clusters = 32, note("occupancy", ""), cudaSuccess;
}

cudaError_t CUDARTAPI cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  return *blocks = 2, note("occupancy", ""), cudaSuccess;
}

cudaError_t CUDARTAPI cudaMemsetAsync(void*, int, size_t, cudaStream_t stream) {
  return note("memset", address("stream", stream)), cudaSuccess;
}

cudaError_t CUDARTAPI cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void** arguments) {
  const std::string name = kernels().at(kernel);
  std::string line = "kernel=" + name + " " + address("stream", config->stream) +
                     field("blocks", config->gridDim.x) + field("threads", config->blockDim.x) +
                     field("shared", config->dynamicSmemBytes) +
                     field("cluster", config->numAttrs > 0 ? config->attrs[0].val.clusterDim.x : 1);
  if (has(name, "cluster_kernel") || has(name, "stream_kernel")) {
    const auto& task = *static_cast<const grpo_fast::RowTask*>(arguments[0]);
    line += field("num_rows", task.rows.num_rows) + field("num_columns", task.rows.num_columns) +
            field("row_stride", task.rows.row_stride) + address("logits", task.rows.logits) +
            address("targets", task.rows.targets) + address("bias", task.rows.bias) +
            address("row_temperature", task.rows.row_temperature) + address("logprobs", task.logprobs) +
            address("entropy", task.entropy) + address("lse", task.lse) + address("live", task.live) +
            address("given_lse", task.given_lse) + address("given_entropy", task.given_entropy) +
            address("g", task.g) + address("e", task.e) + field("vocab_start", task.vocab_start) +
            address("dx", task.dx) + field("dx_stride", task.dx_stride) +
            address("advantages", task.tokens.advantages) + address("weights", task.tokens.weights) +
            address("old_logprobs", task.tokens.old_logprobs) + field("wide_reads", task.wide_reads);
  }
  note("launch", line);
  return failing ? cudaErrorLaunchFailure : cudaSuccess;
}

// What the compiler's host code calls when the module is loaded.
void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  kernels()[host] = name;
}

// What its launches with <<<>>> would call; there are none.
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, void*) { std::abort(); }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { std::abort(); }
cudaError_t __cudaGetKernel(void*, const void*) { std::abort(); }
cudaError_t __cudaLaunchKernel(void*, dim3, dim3, void**, size_t, void*) { std::abort(); }
cudaError_t __cudaInitModule(void**) { std::abort(); }
}
