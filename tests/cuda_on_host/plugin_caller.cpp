// Calls a plugin of the library as TensorRT does, through its C++ interfaces: it finds the creator,
// creates a plugin from attributes, serialises and recreates it, attaches it to a context and enqueues
// it on a stream.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cmath>
#include <cstring>
#include <deque>
#include <memory>
#include <string>
#include <vector>

using namespace nvinfer1;

extern "C" int cuMemAlloc_v2(void** at, size_t size);

namespace {

struct Tensor {
  int32_t rank;
  int32_t type;  // DataType
  int64_t dims[4];
  void* pointer;
};

struct Number final : IDimensionExpr, apiv::VDimensionExpr {
  int64_t value;
  explicit Number(int64_t n) : value(n) { IDimensionExpr::mImpl = this; }
  bool isConstant() const noexcept override { return true; }
  int64_t getConstantValue() const noexcept override { return value; }
  bool isSizeTensor() const noexcept override { return false; }
};

struct Numbers final : IExprBuilder, apiv::VExprBuilder {
  std::deque<Number> made;
  Numbers() { IExprBuilder::mImpl = this; }
  const IDimensionExpr* constant(int64_t value) noexcept override { return &made.emplace_back(value); }
  const IDimensionExpr* operation(DimensionOperation, const IDimensionExpr&,
                                  const IDimensionExpr&) noexcept override {
    return nullptr;
  }
  const IDimensionExpr* declareSizeTensor(int32_t, const IDimensionExpr&,
                                          const IDimensionExpr&) noexcept override {
    return nullptr;
  }
};

PluginTensorDesc describe(const Tensor& tensor) {
  PluginTensorDesc desc{};
  desc.dims.nbDims = tensor.rank;
  std::memcpy(desc.dims.d, tensor.dims, sizeof tensor.dims);
  desc.type = static_cast<DataType>(tensor.type);
  desc.format = TensorFormat::kLINEAR;
  desc.scale = 1.f;
  return desc;
}

thread_local std::string reason;

int fail(const std::string& why) {
  reason = why;
  return 1;
}

IPluginCreatorV3One* find_creator(const char* library, const std::string& name) {
  void* handle = dlopen(library, RTLD_NOW);
  if (!handle) return fail(dlerror()), nullptr;
  using GetCreators = IPluginCreatorInterface* const* (*)(int32_t&);
  const auto get = reinterpret_cast<GetCreators>(dlsym(handle, "getCreators"));
  int32_t count = 0;
  auto* const* creators = get(count);
  for (int i = 0; i < count; ++i) {
    if (std::strcmp(creators[i]->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") != 0) continue;
    auto* creator = static_cast<IPluginCreatorV3One*>(creators[i]);
    if (creator->getPluginName() == name) return creator;
  }
  return fail("no creator of that name"), nullptr;
}

}  // namespace

extern "C" const char* plugin_caller_reason() { return reason.c_str(); }

// Attributes in the creator's own order, as float64; NaN leaves one out. `output` gets its shape and
// type; its pointer is given. `workspace` is allocated here and freed by the caller, if not null.
extern "C" int call_plugin(const char* library, const char* name, const double* values,
                           const Tensor* inputs, int32_t count, Tensor* output, void** workspace,
                           void* stream) {
  *workspace = nullptr;
  IPluginCreatorV3One* creator = find_creator(library, name);
  if (!creator) return 1;
  const PluginFieldCollection* known = creator->getFieldNames();
  std::vector<PluginField> fields;
  for (int i = 0; i < known->nbFields; ++i) {
    if (std::isnan(values[i])) continue;
    fields.emplace_back(known->fields[i].name, &values[i], PluginFieldType::kFLOAT64, 1);
  }
  const PluginFieldCollection given{static_cast<int32_t>(fields.size()), fields.data()};
  std::unique_ptr<IPluginV3> first(creator->createPlugin("layer", &given, TensorRTPhase::kBUILD));
  if (!first) return fail("refused at creation");

  // The builder's calls.
  auto* build = static_cast<IPluginV3OneBuild*>(
      first->getCapabilityInterface(PluginCapabilityType::kBUILD));
  Numbers numbers;
  std::vector<DimsExprs> shapes(count);
  std::vector<DataType> types(count);
  std::vector<PluginTensorDesc> descs;
  std::vector<DynamicPluginTensorDesc> bounds(count + 1);
  for (int i = 0; i < count; ++i) {
    descs.push_back(describe(inputs[i]));
    types[i] = descs[i].type;
    shapes[i].nbDims = inputs[i].rank;
    for (int d = 0; d < inputs[i].rank; ++d) shapes[i].d[d] = numbers.constant(inputs[i].dims[d]);
  }
  DimsExprs shape{};
  DataType type{};
  if (build->getNbOutputs() != 1) return fail("more than one output");
  if (build->getOutputDataTypes(&type, 1, types.data(), count)) return fail("no output type");
  if (build->getOutputShapes(shapes.data(), count, nullptr, 0, &shape, 1, numbers)) {
    return fail("no output shape");
  }
  output->rank = shape.nbDims;
  output->type = static_cast<int32_t>(type);
  for (int d = 0; d < shape.nbDims; ++d) output->dims[d] = shape.d[d]->getConstantValue();
  const PluginTensorDesc out_desc = describe(*output);
  for (int i = 0; i <= count; ++i) {
    const PluginTensorDesc& desc = i < count ? descs[i] : out_desc;
    bounds[i] = {desc, desc.dims, desc.dims, desc.dims};
    if (i < count) bounds[i].desc.dims.d[0] = -1;  // dynamic, as the project's graphs have it
  }
  for (int i = 0; i <= count; ++i) {
    if (!build->supportsFormatCombination(i, bounds.data(), count, 1)) return fail("refused a type");
    bounds[i].desc.format = TensorFormat::kCHW32;
    if (build->supportsFormatCombination(i, bounds.data(), count, 1)) return fail("took a format");
    bounds[i].desc.format = TensorFormat::kLINEAR;
  }
  if (build->configurePlugin(bounds.data(), count, &bounds[count], 1)) return fail("refused a shape");
  const size_t size = build->getWorkspaceSize(bounds.data(), count, &bounds[count], 1);

  // The runtime's calls: it recreates the plugin from a plan.
  auto* runtime = static_cast<IPluginV3OneRuntime*>(
      first->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
  std::unique_ptr<IPluginV3> second(
      creator->createPlugin("layer", runtime->getFieldsToSerialize(), TensorRTPhase::kRUNTIME));
  first.reset();
  if (!second) return fail("refused its own fields");
  runtime = static_cast<IPluginV3OneRuntime*>(
      second->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
  std::unique_ptr<IPluginV3> attached(runtime->attachToContext(nullptr));
  second.reset();
  if (!attached) return fail("not attached");
  runtime = static_cast<IPluginV3OneRuntime*>(
      attached->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
  if (runtime->onShapeChange(descs.data(), count, &out_desc, 1)) return fail("refused a shape");
  if (size && cuMemAlloc_v2(workspace, size)) return fail("no workspace");
  std::vector<const void*> pointers;
  for (int i = 0; i < count; ++i) pointers.push_back(inputs[i].pointer);
  void* outputs[] = {output->pointer};
  if (runtime->enqueue(descs.data(), &out_desc, pointers.data(), outputs, *workspace,
                       static_cast<cudaStream_t>(stream))) {
    return fail("enqueue failed");
  }
  return 0;
}
