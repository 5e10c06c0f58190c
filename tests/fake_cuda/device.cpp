// A CUDA device for PyTorch on a machine without one: memory of the host, and the operators of the CPU. It keeps the rules
// of CUDA graphs: in a capture nothing makes the host wait, everything is on the captured stream, nothing is computed, and
// a replay computes it from the memory that was recorded.

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/_log_softmax.h>
#include <ATen/ops/_log_softmax_backward_data.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/view_native.h>
#include <ATen/ops/zeros.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <functional>
#include <set>

using at::IntArrayRef;
using at::Tensor;
using c10::Device;
using c10::IValue;
using c10::Stream;
using Stack = torch::jit::Stack;
using Work = std::function<void()>;

namespace {

const Device GPU(at::kCUDA, 0);
thread_local int64_t current_stream = 0;
bool capturing = false;
int64_t captured_stream = 0;
std::vector<std::vector<Work>> graphs;                  // the last one is that of the capture under way
std::vector<std::pair<Tensor, Tensor>> overwritten;     // memory that the capture wrote to, and what it held
std::set<const void*> pinned;

void host_waits(const std::string& why) { TORCH_CHECK(!capturing, "in a capture: ", why); }

// The same memory as a tensor of another device.
Tensor relabel(const Tensor& t, Device device) {
  auto* owner = new c10::Storage(t.storage());
  c10::DataPtr data(owner->mutable_data(), owner, [](void* p) { delete static_cast<c10::Storage*>(p); }, device);
  c10::Storage storage(c10::Storage::use_byte_size_t(), owner->nbytes(), std::move(data), c10::GetCPUAllocator(), true);
  auto key = device.is_cpu() ? c10::DispatchKey::CPU : c10::DispatchKey::CUDA;
  auto out = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), t.dtype());
  out.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
  return out;
}

Tensor on_host(const Tensor& t) { return t.is_cuda() ? relabel(t, at::kCPU) : t; }

void copy_on_host(const Tensor& to, const Tensor& from) {
  if (to.defined() && !to.is_same(from)) Tensor(to).copy_(from);
}

// Compute results on the host, now and in each replay. written: inputs that it changes.
Stack compute(const std::vector<Tensor>& written, const std::function<Stack()>& work) {
  auto work_below = [work] {
    c10::impl::ExcludeDispatchKeyGuard guard(c10::autograd_dispatch_keyset_with_ADInplaceOrView);
    return work();
  };
  if (!capturing) return work_below();
  TORCH_CHECK(current_stream == captured_stream, "in a capture: work on another stream");
  c10::impl::ExcludeDispatchKeyGuard guard(c10::autograd_dispatch_keyset_with_ADInplaceOrView);
  for (const auto& t : written) overwritten.emplace_back(t, t.clone());
  auto result = work_below();
  graphs.back().push_back([work_below, result] {
    auto again = work_below();
    c10::impl::ExcludeDispatchKeyGuard guard(c10::autograd_dispatch_keyset_with_ADInplaceOrView);
    for (size_t i = 0; i < again.size(); i++) {
      if (again[i].isTensor()) copy_on_host(result[i].toTensor(), again[i].toTensor());
      if (!again[i].isTensorList()) continue;
      auto to = result[i].toTensorVector(), from = again[i].toTensorVector();
      for (size_t j = 0; j < to.size(); j++) copy_on_host(to[j], from[j]);
    }
  });
  return result;
}

// The arguments of a call as tensors of the host, and its results as tensors of the GPU.
struct Host {
  std::string name;
  std::vector<std::pair<Tensor, Tensor>> pairs;  // on the GPU, on the host
  std::vector<Tensor> written;

  Tensor to(const Tensor& t, bool is_written) {
    if (!t.defined()) return t;
    if (!t.is_cuda()) {  // a number, whose value a graph would keep; or an index, which is copied
      auto* impl = t.unsafeGetTensorImpl();
      bool is_index = name.rfind("aten::index", 0) == 0;
      if (!impl->is_wrapped_number()) TORCH_CHECK(!capturing, "in a capture: ", name, " takes a tensor of the CPU");
      TORCH_CHECK(t.dim() == 0 || is_index, name, " takes tensors of the GPU and of the CPU");
      return t;
    }
    auto pair = std::find_if(pairs.begin(), pairs.end(), [&](const auto& pair) { return pair.first.is_same(t); });
    if (pair == pairs.end()) pair = pairs.insert(pairs.end(), {t, on_host(t)});
    if (is_written) written.push_back(pair->second);
    return pair->second;
  }

  Tensor from(const Tensor& t) const {
    if (!t.defined()) return t;
    for (const auto& [gpu, host] : pairs)
      if (host.is_same(t)) return gpu;
    return relabel(t, GPU);
  }

  void resize() const {  // an output that the call has given a size
    for (const auto& [gpu, host] : pairs) {
      if (gpu.sizes() == host.sizes()) continue;
      gpu.unsafeGetTensorImpl()->set_storage_keep_dtype(relabel(host, GPU).storage());
      gpu.unsafeGetTensorImpl()->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
    }
  }
};

void check(const c10::OperatorHandle& op, const std::vector<IValue>& args) {
  const auto& name = op.schema().name();
  bool waits = op.hasTag(at::Tag::data_dependent_output), is_index = name.rfind("aten::index", 0) == 0;
  if (!is_index) waits |= op.hasTag(at::Tag::dynamic_output_shape);
  for (const auto& arg : args) {
    if (!is_index || !arg.isOptionalTensorList()) continue;
    for (const std::optional<Tensor> t : arg.toOptionalTensorList())  // its shape is the number of ones in a mask
      waits |= t && (!t->is_cuda() || t->scalar_type() == at::kBool || t->scalar_type() == at::kByte);
  }
  if (waits) host_waits(name + " asks for values");
  if (name == "aten::cumsum" && args[0].toTensor().is_floating_point())
    at::globalContext().alertNotDeterministic("cumsum_cuda_kernel");
}

// All operators that have no kernel below.
void fallback(const c10::OperatorHandle& op, Stack* stack) {
  const auto& formal = op.schema().arguments();
  std::vector<IValue> args(stack->end() - formal.size(), stack->end());
  check(op, args);
  Host host{op.schema().name(), {}, {}};
  for (size_t i = 0; i < args.size(); i++) {
    auto& arg = args[i];
    bool is_written = formal[i].alias_info() && formal[i].alias_info()->isWrite();
    if (arg.isTensor()) {
      arg = host.to(arg.toTensor(), is_written);
    } else if (arg.isTensorList()) {
      std::vector<Tensor> list;
      for (const Tensor& t : arg.toTensorVector()) list.push_back(host.to(t, is_written));
      arg = list;
    } else if (arg.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const std::optional<Tensor> t : arg.toOptionalTensorList())
        list.push_back(t ? std::optional<Tensor>(host.to(*t, false)) : std::nullopt);
      arg = list;
    } else if (arg.isDevice()) {
      arg = Device(at::kCPU);
    }
  }
  auto results = compute(host.written, [op, args] {
    Stack call = args;
    op.callBoxed(&call);
    return call;
  });
  host.resize();
  stack->erase(stack->end() - formal.size(), stack->end());
  for (auto& result : results) {
    if (result.isTensor()) {
      stack->emplace_back(host.from(result.toTensor()));
    } else if (result.isTensorList()) {
      std::vector<Tensor> list;
      for (const Tensor& t : result.toTensorVector()) list.push_back(host.from(t));
      stack->emplace_back(list);
    } else {
      stack->push_back(result);
    }
  }
}

// --- kernels ---------------------------------------------------------------------------------------------------------

using Type = std::optional<at::ScalarType>;
using Layout = std::optional<at::Layout>;
using Where = std::optional<Device>;
using Flag = std::optional<bool>;

// Zeros: a Triton kernel that is not run would leave what nobody wrote.
Tensor empty(IntArrayRef size, Type type, Layout, Where, Flag, std::optional<at::MemoryFormat>) {
  return relabel(at::zeros(size, at::TensorOptions().dtype(type)), GPU);
}

Tensor empty_strided(IntArrayRef size, IntArrayRef stride, Type type, Layout, Where, Flag) {
  return relabel(at::empty_strided(size, stride, at::TensorOptions().dtype(type)).zero_(), GPU);
}

Tensor& copy(Tensor& to, const Tensor& from, bool non_blocking) {
  if (!(to.is_cuda() && from.is_cuda())) {
    const auto& host = to.is_cuda() ? from : to;
    if (!(non_blocking && pinned.count(host.storage().data()))) host_waits("a copy that waits, or of pageable memory");
  }
  auto target = on_host(to), source = on_host(from);
  compute({target}, [target, source] {
    Tensor(target).copy_(source);
    return Stack();
  });
  return to;
}

at::Scalar item(const Tensor& t) {
  host_waits("the host reads a value");
  return on_host(t).item();
}

// A CPU has no sum in float32 of products in 16 bits.
Tensor& addmm(
    const Tensor& sum, const Tensor& a, const Tensor& b, at::ScalarType type, const at::Scalar& beta,
    const at::Scalar& alpha, Tensor& out) {
  TORCH_CHECK(type == at::kFloat && out.scalar_type() == type && sum.scalar_type() == type, "addmm: not in float32");
  TORCH_CHECK(a.scalar_type() == b.scalar_type() && a.scalar_type() != type, "addmm: not of 16 bits");
  auto target = on_host(out), s = on_host(sum), x = on_host(a), y = on_host(b);
  compute({target}, [=] {
    Tensor(target).copy_(at::addmm(s, x.to(type), y.to(type), beta, alpha));
    return Stack();
  });
  return out;
}

Tensor mm(const Tensor& a, const Tensor& b, at::ScalarType type) {
  TORCH_CHECK(type == at::kFloat && a.scalar_type() == b.scalar_type() && a.scalar_type() != type, "mm: not of 16 bits");
  auto x = on_host(a), y = on_host(b);
  auto result = compute({}, [=] { return Stack{at::mm(x.to(type), y.to(type))}; });
  return relabel(result[0].toTensor(), GPU);
}

// A CPU does not go from 16 bits to float32 on the way.
Tensor log_softmax(const Tensor& x, int64_t dim, bool to_float) {
  auto host = on_host(x);
  auto result = compute({}, [=] { return Stack{at::_log_softmax(to_float ? host.to(at::kFloat) : host, dim, false)}; });
  return relabel(result[0].toTensor(), GPU);
}

Tensor log_softmax_backward(const Tensor& grad, const Tensor& output, int64_t dim, at::ScalarType type) {
  auto g = on_host(grad), y = on_host(output);
  auto result = compute({}, [=] {
    return Stack{at::_log_softmax_backward_data(g, y, dim, g.scalar_type()).to(type)};
  });
  return relabel(result[0].toTensor(), GPU);
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("copy_", copy);
  m.impl("_local_scalar_dense", item);
  m.impl("addmm.dtype_out", addmm);
  m.impl("mm.dtype", mm);
  m.impl("_log_softmax", log_softmax);
  m.impl("_log_softmax_backward_data", log_softmax_backward);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("record_stream", [](Tensor&, Stream) {});
}

// --- the device: streams, pinned memory, graphs ----------------------------------------------------------------------

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return at::kCUDA; }
  Device exchangeDevice(Device) const override { return GPU; }
  Device getDevice() const override { return GPU; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const override { return Stream(Stream::UNSAFE, GPU, current_stream); }
  Stream getDefaultStream(Device) const override { return Stream(Stream::UNSAFE, GPU, 0); }
  Stream getNewStream(Device, int) const override {
    static int64_t n = 0;
    return Stream(Stream::UNSAFE, GPU, ++n);
  }
  Stream exchangeStream(Stream stream) const override {
    auto before = getStream(GPU);
    current_stream = stream.id();
    return before;
  }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void** event, const Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    *event = const_cast<Guard*>(this);
  }
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  void synchronizeEvent(void*) const override { host_waits("for an event"); }
  void synchronizeStream(const Stream&) const override { host_waits("for a stream"); }
  void synchronizeDevice(const c10::DeviceIndex) const override { host_waits("for the device"); }
  void recordDataPtrOnStream(const c10::DataPtr&, const Stream&) const override {}
};

struct Pinned final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    auto* owner = new c10::DataPtr(c10::GetCPUAllocator()->allocate(n));
    pinned.insert(owner->get());
    return {owner->get(), owner, [](void* p) {
      auto* owner = static_cast<c10::DataPtr*>(p);
      pinned.erase(owner->get());
      delete owner;
    }, at::kCPU};
  }
  void copy_data(void* to, const void* from, size_t n) const override { default_copy_data(to, from, n); }
};

C10_REGISTER_GUARD_IMPL(CUDA, Guard)

TORCH_LIBRARY(fake_cuda, m) {
  m.def("load_code", [](const std::string& name) { host_waits("code is loaded, " + name); });
  m.def("begin_capture", [] {
    graphs.emplace_back();
    captured_stream = current_stream;
    TORCH_CHECK(captured_stream != 0, "a capture on the default stream");
    capturing = true;
  });
  m.def("end_capture", []() -> int64_t {  // undoes what recording has computed
    capturing = false;
    c10::impl::ExcludeDispatchKeyGuard guard(c10::autograd_dispatch_keyset_with_ADInplaceOrView);
    for (auto pair = overwritten.rbegin(); pair != overwritten.rend(); pair++)
      if (pair->first.sizes() == pair->second.sizes()) pair->first.copy_(pair->second);  // else it was empty before
    overwritten.clear();
    return static_cast<int64_t>(graphs.size()) - 1;
  });
  m.def("replay", [](int64_t graph) {
    for (const auto& work : graphs.at(graph)) work();
  });
}

}  // namespace

namespace at {
struct Hooks final : CUDAHooksInterface {
  Hooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  bool isPinnedPtr(const void* data) const override { return pinned.count(data) > 0; }
  Allocator* getPinnedMemoryAllocator() const override {
    static Pinned allocator;
    return &allocator;
  }
};
C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", Hooks);
}  // namespace at
