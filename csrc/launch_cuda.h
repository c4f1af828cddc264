// Launching kernels with every return code checked.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

namespace grpo_fast {

// What an error message tells of a launch.
struct LaunchShape {
  std::string kernel;
  int64_t blocks = 0;
  int threads = 0;
  int cluster = 1;
  int shared_bytes = 0;
};

// Raises the error unless it is success; it is not left behind for the next caller of CUDA.
inline void check(cudaError_t status, const char* call, const LaunchShape& shape) {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();
  std::ostringstream message;
  message << shape.kernel;
  if (shape.blocks > 0) {
    message << " (" << shape.blocks << " blocks of " << shape.threads << " threads, clusters of " << shape.cluster
            << ", " << shape.shared_bytes << " bytes of dynamic shared memory)";
  }
  message << ": " << call << ": " << cudaGetErrorName(status) << ": " << cudaGetErrorString(status);
  throw std::runtime_error(message.str());
}

// Makes `device` current, and what was current before again at the end.
class CurrentDevice {
 public:
  CurrentDevice(int device, const LaunchShape& shape) {
    check(cudaGetDevice(&before_), "cudaGetDevice", shape);
    if (device != before_) {
      check(cudaSetDevice(device), "cudaSetDevice", shape);
    } else {
      before_ = -1;
    }
  }
  ~CurrentDevice() {
    if (before_ >= 0) (void)cudaSetDevice(before_);
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int before_ = -1;
};

inline int device_attribute(cudaDeviceAttr attribute, int device, const LaunchShape& shape) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute", shape);
  return value;
}

// A launch configuration; `cluster` 1: none.
struct LaunchConfig {
  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config{};

  LaunchConfig(const LaunchShape& shape, cudaStream_t stream) {
    config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
    config.blockDim = dim3(static_cast<unsigned>(shape.threads));
    config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
    config.stream = stream;
    if (shape.cluster > 1) {
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = static_cast<unsigned>(shape.cluster);
      attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
      config.attrs = &attribute;
      config.numAttrs = 1;
    }
  }
  LaunchConfig(const LaunchConfig&) = delete;  // config points into this
  LaunchConfig& operator=(const LaunchConfig&) = delete;
};

template <class... Parameters>
void launch(void (*kernel)(Parameters...), const LaunchShape& shape, cudaStream_t stream, Parameters... arguments) {
  if (shape.blocks > INT32_MAX) {
    throw std::invalid_argument("rows: expected at most 2147483647 blocks; got " + std::to_string(shape.blocks));
  }
  const LaunchConfig built(shape, stream);
  void* pointers[] = {static_cast<void*>(&arguments)...};
  check(cudaLaunchKernelExC(&built.config, reinterpret_cast<const void*>(kernel), pointers), "cudaLaunchKernelExC",
        shape);
}

}  // namespace grpo_fast
