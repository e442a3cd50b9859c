// Python module jaxmoe._cpu: the CPU handlers for XLA, and the groups that they serve.

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <utility>
#include <vector>

#include "xla_ffi/common/config.h"
#include "xla_ffi/cpu/group.h"
#include "xla_ffi/cpu/handlers.h"

namespace nb = nanobind;

namespace jaxmoe {
namespace {

nb::capsule Capsule(XLA_FFI_Handler* handler) {
  return nb::capsule(reinterpret_cast<void*>(handler));
}

// {target: {"instantiate": capsule, "execute": capsule}}
nb::dict Handlers() {
  nb::dict handlers;
  for (const HandlerEntry& entry : CpuHandlers()) {
    nb::dict stages;
    stages["instantiate"] = Capsule(entry.instantiate);
    stages["execute"] = Capsule(entry.execute);
    handlers[entry.target] = stages;
  }
  return handlers;
}

// What `jax.ffi.register_ffi_type` wants to know of the state that compiled calls keep.
nb::dict StateType() {
  nb::dict type;
  type["type_id"] = nb::capsule(&CallState::id);
  type["type_info"] = nb::capsule(&CallState::info);
  return type;
}

std::shared_ptr<Group> Existing(int64_t uid) {
  auto group = Group::Find(uid);
  if (group == nullptr) throw std::runtime_error("the group is closed");
  return group;
}

xla::ffi::DataType DataTypeNamed(const std::string& name) {
  if (name == "bfloat16") return xla::ffi::DataType::BF16;
  if (name == "float16") return xla::ffi::DataType::F16;
  if (name == "float32") return xla::ffi::DataType::F32;
  throw std::invalid_argument("expected bfloat16, float16 or float32, got " + name);
}

void OpenGroup(int64_t uid, double timeout_seconds, std::vector<std::vector<int64_t>> process_of,
               int64_t here) {
  Group::Open({uid, timeout_seconds, std::move(process_of), here});
}

void CreateSegment(int64_t uid, const std::string& name, int64_t num_devices, int64_t num_experts,
                   int64_t max_tokens, int64_t top_k, int64_t dim, const std::string& dtype) {
  CallShape largest{max_tokens, top_k, dim, 0, num_devices, num_experts, 0, DataTypeNamed(dtype)};
  Existing(uid)->CreateSegment(name, largest);
}

}  // namespace
}  // namespace jaxmoe

NB_MODULE(_cpu, m) {
  using namespace jaxmoe;
  m.doc() = "The CPU transport's XLA handlers and groups.";
  m.def("handlers", &Handlers);
  m.def("state_type", &StateType);
  m.def("open_group", &OpenGroup, nb::arg("uid"), nb::arg("timeout_seconds"), nb::arg("process_of"),
        nb::arg("here"));
  m.def("close_group", &Group::Close, nb::arg("uid"), nb::call_guard<nb::gil_scoped_release>());
  m.def("create_segment", &CreateSegment, nb::kw_only(), nb::arg("uid"), nb::arg("name"),
        nb::arg("num_devices"), nb::arg("num_experts"), nb::arg("max_tokens"), nb::arg("top_k"),
        nb::arg("dim"), nb::arg("dtype"));
  m.def(
      "map_segment",
      [](int64_t uid, int64_t process, const std::string& name) {
        Existing(uid)->MapSegment(process, name);
      },
      nb::arg("uid"), nb::arg("process"), nb::arg("name"));
  m.def("unlink_segment", [](int64_t uid) { Existing(uid)->UnlinkSegment(); }, nb::arg("uid"));
}
