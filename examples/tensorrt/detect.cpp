// Run a bundle's detector plan from C++: load the plugin library, the plan, and time it on zeros.
//
// Build:  g++ -std=c++17 detect.cpp -I$TENSORRT/include -I/usr/local/cuda/include
//             -L$TENSORRT/lib -L/usr/local/cuda/lib64 -lnvinfer -lcudart -o detect
// Run:    ./detect $(python -m maskcast.engines.tensorrt.plugins.library) BUNDLE/detector.plan
#include <NvInfer.h>
#include <cuda_runtime_api.h>

#include <fstream>
#include <iostream>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

class Logger : public nvinfer1::ILogger {
  void log(Severity severity, const char* message) noexcept override {
    if (severity <= Severity::kWARNING) std::cerr << message << "\n";
  }
};

int main(int argc, char** argv) {
  if (argc != 3) return std::cerr << "usage: detect LIBRARY PLAN\n", 2;
  Logger logger;
  std::unique_ptr<nvinfer1::IRuntime> runtime(nvinfer1::createInferRuntime(logger));
  if (!runtime->getPluginRegistry().loadLibrary(argv[1])) return 1;
  std::ifstream file(argv[2], std::ios::binary);
  const std::vector<char> plan{std::istreambuf_iterator<char>(file), {}};
  std::unique_ptr<nvinfer1::ICudaEngine> engine(
      runtime->deserializeCudaEngine(plan.data(), plan.size()));
  if (!engine) return 1;
  std::unique_ptr<nvinfer1::IExecutionContext> context(engine->createExecutionContext());

  cudaStream_t stream;
  if (!context || cudaStreamCreate(&stream) != cudaSuccess) return 1;
  for (int i = 0; i < engine->getNbIOTensors(); ++i) {
    const char* name = engine->getIOTensorName(i);
    nvinfer1::Dims shape = engine->getTensorShape(name);
    shape.d[0] = 1;  // one image
    size_t bytes = 8;  // the largest element type
    for (int d = 0; d < shape.nbDims; ++d) bytes *= shape.d[d];
    void* memory = nullptr;
    if (cudaMalloc(&memory, bytes) != cudaSuccess || cudaMemset(memory, 0, bytes) != cudaSuccess) {
      return 1;
    }
    context->setTensorAddress(name, memory);
    if (engine->getTensorIOMode(name) == nvinfer1::TensorIOMode::kINPUT) {
      context->setInputShape(name, shape);
    }
  }
  cudaEvent_t start, end;
  cudaEventCreate(&start);
  cudaEventCreate(&end);
  constexpr int kRuns = 100;
  for (int i = -10; i < kRuns; ++i) {
    if (i == 0) cudaEventRecord(start, stream);
    if (!context->enqueueV3(stream)) return 1;
  }
  cudaEventRecord(end, stream);
  cudaStreamSynchronize(stream);
  float ms = 0;
  cudaEventElapsedTime(&ms, start, end);
  std::cout << ms / kRuns << " ms per detection\n";
}
