// The operators MultiscaleRoiAlign and GroupedNms as plugins of TensorRT and TensorRT-RTX.
//
// Load the library with IPluginRegistry::loadLibrary, `trtexec --staticPlugins` or dlopen; TensorRT
// finds the plugins through getCreators. Only TensorRT's headers are needed, 10.12 or later: every
// call goes through virtual functions.
#include <NvInferRuntime.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <new>

#include "driver.h"
#include "launch.h"

namespace {

using namespace nvinfer1;

constexpr char kNamespace[] = "maskcast", kVersion[] = "1";
constexpr int kFields = 3;  // of each operator

void report(const char* plugin, const char* reason) noexcept {
  std::fprintf(stderr, "maskcast: %s: %s\n", plugin, reason);
}

// An attribute of an operator: its name, type, and a pointer to its value, an int32 or a float32.
struct Attribute {
  const char* name;
  PluginFieldType type;
  void* value;
};

// Reads one number of any type that a parser may pass. Returns false if it is not a number or does
// not fit.
bool read(const PluginField& field, const Attribute& attribute) {
  if (!field.data || field.length < 1) return false;
  double number = 0;
  switch (field.type) {
    case PluginFieldType::kINT32: number = *static_cast<const int32_t*>(field.data); break;
    case PluginFieldType::kINT64: number = static_cast<double>(*static_cast<const int64_t*>(field.data)); break;
    case PluginFieldType::kFLOAT32: number = *static_cast<const float*>(field.data); break;
    case PluginFieldType::kFLOAT64: number = *static_cast<const double*>(field.data); break;
    default: return false;
  }
  if (attribute.type == PluginFieldType::kFLOAT32) {
    *static_cast<float*>(attribute.value) = static_cast<float>(number);
    return true;
  }
  if (number != std::floor(number) || std::abs(number) > INT32_MAX) return false;
  *static_cast<int32_t*>(attribute.value) = static_cast<int32_t>(number);
  return true;
}

// Attributes in TensorRT's form; the collection points into this object and to the values.
struct Fields {
  PluginField fields[kFields];
  PluginFieldCollection collection = {kFields, fields};

  const PluginFieldCollection* of(const Attribute* attributes) {
    for (int i = 0; i < kFields; ++i) {
      fields[i] = PluginField(attributes[i].name, attributes[i].value, attributes[i].type, 1);
    }
    return &collection;
  }
};

int64_t largest(const DynamicPluginTensorDesc& tensor, int dimension) {
  const int64_t now = tensor.desc.dims.d[dimension], most = tensor.max.d[dimension];
  return now > most ? now : most;  // a dynamic dimension is -1 in `desc`
}

struct RoiAlign {
  static constexpr char kName[] = "MultiscaleRoiAlign";
  static constexpr int kInputs = 6;

  int32_t output_size = 7, sampling_ratio = 2, aligned = 0;

  void attributes(Attribute* all) {
    all[0] = {"output_size", PluginFieldType::kINT32, &output_size};
    all[1] = {"sampling_ratio", PluginFieldType::kINT32, &sampling_ratio};
    all[2] = {"aligned", PluginFieldType::kINT32, &aligned};
  }
  const char* refusal() const {
    if (output_size < 1 || sampling_ratio < 1 ||
        int64_t{output_size} * sampling_ratio > maskcast::kMaxTaps) {
      return "output_size and sampling_ratio must be 1 or more, and their product at most 64";
    }
    return nullptr;
  }
  static const char* refusal(int64_t images, int64_t channels) {
    (void)images;
    return channels > 65535 ? "more than 65535 channels" : nullptr;
  }
  static DataType output_type(const DataType* inputs) { return inputs[0]; }
  void output_shape(const DimsExprs* inputs, DimsExprs& output, IExprBuilder& builder) const {
    output.nbDims = 4;
    output.d[0] = inputs[4].d[0];
    output.d[1] = inputs[0].d[1];
    output.d[2] = output.d[3] = builder.constant(output_size);
  }
  static bool accepts(int position, DataType type, const DynamicPluginTensorDesc* tensors) {
    if (position == 0) return type == DataType::kFLOAT || type == DataType::kHALF;
    if (position == 4) return type == DataType::kFLOAT;
    if (position == 5) return type == DataType::kINT32;
    return type == tensors[0].desc.type;
  }
  static size_t workspace(const DynamicPluginTensorDesc*) { return 0; }
  int enqueue(const PluginTensorDesc* inputs, const void* const* in, void* out, void*,
              cudaStream_t stream) const {
    maskcast::RoiAlignArguments a = {};
    for (int i = 0; i < maskcast::kLevels; ++i) {
      a.features[i] = in[i];
      a.heights[i] = static_cast<int32_t>(inputs[i].dims.d[2]);
      a.widths[i] = static_cast<int32_t>(inputs[i].dims.d[3]);
    }
    a.rois = static_cast<const float*>(in[4]);
    a.batch_index = static_cast<const int32_t*>(in[5]);
    a.pooled = out;
    a.images = static_cast<int32_t>(inputs[0].dims.d[0]);
    a.channels = static_cast<int32_t>(inputs[0].dims.d[1]);
    a.boxes = static_cast<int32_t>(inputs[4].dims.d[0]);
    a.output_size = output_size;
    a.sampling_ratio = sampling_ratio;
    a.aligned = aligned;
    return maskcast::roi_align(a, inputs[0].type == DataType::kHALF, stream);
  }
};

struct GroupedNms {
  static constexpr char kName[] = "GroupedNms";
  static constexpr int kInputs = 3;

  float iou_threshold = 0.5f, score_threshold = 0.f;
  int32_t max_output = 100;

  void attributes(Attribute* all) {
    all[0] = {"iou_threshold", PluginFieldType::kFLOAT32, &iou_threshold};
    all[1] = {"score_threshold", PluginFieldType::kFLOAT32, &score_threshold};
    all[2] = {"max_output", PluginFieldType::kINT32, &max_output};
  }
  const char* refusal() const {
    if (max_output < 1) return "max_output must be 1 or more";
    return iou_threshold >= 0.f ? nullptr : "iou_threshold must be 0 or more";
  }
  static const char* refusal(int64_t images, int64_t candidates) {
    if (candidates > maskcast::kMaxCandidates) return "more than 8192 candidates an image";
    return images > 65535 ? "more than 65535 images" : nullptr;
  }
  static DataType output_type(const DataType*) { return DataType::kINT32; }
  void output_shape(const DimsExprs* inputs, DimsExprs& output, IExprBuilder& builder) const {
    output.nbDims = 2;
    output.d[0] = inputs[0].d[0];
    output.d[1] = builder.constant(max_output);
  }
  static bool accepts(int position, DataType type, const DynamicPluginTensorDesc*) {
    return type == (position < 2 ? DataType::kFLOAT : DataType::kINT32);
  }
  static size_t workspace(const DynamicPluginTensorDesc* inputs) {
    return maskcast::NmsWorkspace(largest(inputs[0], 0), largest(inputs[0], 1)).bytes();
  }
  int enqueue(const PluginTensorDesc* inputs, const void* const* in, void* out, void* workspace,
              cudaStream_t stream) const {
    maskcast::NmsArguments a = {};
    a.boxes = static_cast<const float*>(in[0]);
    a.scores = static_cast<const float*>(in[1]);
    a.groups = static_cast<const int32_t*>(in[2]);
    a.keep = static_cast<int32_t*>(out);
    a.images = static_cast<int32_t>(inputs[0].dims.d[0]);
    a.candidates = static_cast<int32_t>(inputs[0].dims.d[1]);
    a.max_output = max_output;
    a.iou_threshold = iou_threshold;
    a.score_threshold = score_threshold;
    return maskcast::grouped_nms(a, workspace, stream);
  }
};

// The interfaces of a plugin for an operator, which has one output, attributes, and kernels.
template <typename Operator>
class Plugin final : public IPluginV3,
                     public IPluginV3OneCore,
                     public IPluginV3OneBuild,
                     public IPluginV3OneRuntime {
 public:
  explicit Plugin(const Operator& made) : operator_(made) {}

  IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
    if (type == PluginCapabilityType::kBUILD) return static_cast<IPluginV3OneBuild*>(this);
    if (type == PluginCapabilityType::kRUNTIME) return static_cast<IPluginV3OneRuntime*>(this);
    return static_cast<IPluginV3OneCore*>(this);
  }
  IPluginV3* clone() noexcept override { return new (std::nothrow) Plugin(operator_); }
  const char* getPluginName() const noexcept override { return Operator::kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

  int32_t getNbOutputs() const noexcept override { return 1; }
  int32_t getOutputDataTypes(DataType* outputs, int32_t, const DataType* inputs,
                             int32_t) const noexcept override {
    outputs[0] = Operator::output_type(inputs);
    return 0;
  }
  int32_t getOutputShapes(const DimsExprs* inputs, int32_t, const DimsExprs*, int32_t,
                          DimsExprs* outputs, int32_t, IExprBuilder& builder) noexcept override {
    operator_.output_shape(inputs, outputs[0], builder);
    return 0;
  }
  bool supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc* tensors, int32_t,
                                 int32_t) noexcept override {
    const PluginTensorDesc& desc = tensors[position].desc;
    return desc.format == TensorFormat::kLINEAR && Operator::accepts(position, desc.type, tensors);
  }
  int32_t configurePlugin(const DynamicPluginTensorDesc* inputs, int32_t,
                          const DynamicPluginTensorDesc*, int32_t) noexcept override {
    return refused(Operator::refusal(largest(inputs[0], 0), largest(inputs[0], 1)));
  }
  int32_t onShapeChange(const PluginTensorDesc* inputs, int32_t, const PluginTensorDesc*,
                        int32_t) noexcept override {
    return refused(Operator::refusal(inputs[0].dims.d[0], inputs[0].dims.d[1]));
  }
  size_t getWorkspaceSize(const DynamicPluginTensorDesc* inputs, int32_t,
                          const DynamicPluginTensorDesc*, int32_t) const noexcept override {
    return Operator::workspace(inputs);
  }

  // Loads the kernels now, because `enqueue` may be captured in a CUDA graph, where it cannot.
  IPluginV3* attachToContext(IPluginResourceContext*) noexcept override {
    return failed(maskcast::load()) ? nullptr : clone();
  }
  const PluginFieldCollection* getFieldsToSerialize() noexcept override {
    Attribute attributes[kFields];
    operator_.attributes(attributes);
    return fields_.of(attributes);
  }
  int32_t enqueue(const PluginTensorDesc* inputs, const PluginTensorDesc*, const void* const* in,
                  void* const* out, void* workspace, cudaStream_t stream) noexcept override {
    return failed(operator_.enqueue(inputs, in, out[0], workspace, stream));
  }

 private:
  static int32_t refused(const char* reason) noexcept {
    if (reason) report(Operator::kName, reason);
    return reason ? -1 : 0;
  }
  static int32_t failed(int status) noexcept {
    return refused(status ? maskcast::describe(status) : nullptr);
  }

  Operator operator_;
  Fields fields_;
};

template <typename Operator>
class Creator final : public IPluginCreatorV3One {
 public:
  IPluginV3* createPlugin(const char*, const PluginFieldCollection* given,
                          TensorRTPhase) noexcept override {
    Operator made;
    Attribute attributes[kFields];
    made.attributes(attributes);
    for (int i = 0; given && i < given->nbFields; ++i) {
      for (const Attribute& attribute : attributes) {
        if (std::strcmp(attribute.name, given->fields[i].name) != 0) continue;
        if (!read(given->fields[i], attribute)) {
          report(Operator::kName, "an attribute is not one number of its type");
          return nullptr;
        }
      }
    }
    if (const char* reason = made.refusal()) {
      report(Operator::kName, reason);
      return nullptr;
    }
    return new (std::nothrow) Plugin<Operator>(made);
  }
  const PluginFieldCollection* getFieldNames() noexcept override {
    Attribute attributes[kFields];
    defaults_.attributes(attributes);
    return fields_.of(attributes);
  }
  const char* getPluginName() const noexcept override { return Operator::kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

 private:
  Operator defaults_;
  Fields fields_;
};

}  // namespace

extern "C" __attribute__((visibility("default"))) IPluginCreatorInterface* const* getCreators(
    int32_t& count) {
  static Creator<RoiAlign> roi_align;
  static Creator<GroupedNms> grouped_nms;
  static IPluginCreatorInterface* const creators[] = {&roi_align, &grouped_nms};
  count = 2;
  return creators;
}

// TensorRT looks for this function. The logger is not used: findLogger() has different places in the
// virtual tables of TensorRT 10 and 11, and one library serves both.
extern "C" __attribute__((visibility("default"))) void setLoggerFinder(ILoggerFinder*) {}
