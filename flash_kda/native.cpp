// The short way of flash_kda/ordinary.py in C++: the same checks and the same arguments for the kernel, sooner.
//
// PyTorch's tensors are read through the table of C functions that torch.Tensor.__dlpack_c_exchange_api__ holds (DLPack
// 1.x), and Python is called through its stable ABI. What of both is used is declared here, so neither is needed to
// build, and one binary serves all versions.
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "flash_kda.h"

// ------------------------------------------------------------------------------- Python's stable ABI, of 3.10

struct PyObject;
struct PyThreadState;
using FastFunction = PyObject* (*)(PyObject* self, PyObject* const* arguments, intptr_t count);
struct PyMethodDef {
  const char* name;
  FastFunction function;
  int flags;
  const char* doc;
};
constexpr int METH_FASTCALL = 0x80;

extern "C" {
PyObject* PyObject_Type(PyObject*);
PyObject* PyObject_CallFunctionObjArgs(PyObject*, ...);
int PyObject_IsTrue(PyObject*);
double PyFloat_AsDouble(PyObject*);
PyObject* PyLong_FromLong(long);
long long PyLong_AsLongLong(PyObject*);
void* PyLong_AsVoidPtr(PyObject*);
PyObject* PyBytes_FromStringAndSize(const char*, intptr_t);
PyObject* PyErr_Occurred();
void PyErr_Clear();
void Py_IncRef(PyObject*);
void Py_DecRef(PyObject*);
PyThreadState* PyEval_SaveThread();
void PyEval_RestoreThread(PyThreadState*);
PyObject* PyCFunction_NewEx(PyMethodDef*, PyObject* self, PyObject* module);
}

// ---------------------------------------------------------------------------------------------- DLPack, of 1.x

struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct DLPackExchangeAPI {
  uint32_t major, minor;
  void* previous;
  void* owning[3];
  int (*view)(PyObject* tensor, DLTensor* out);  // dltensor_from_py_object_no_sync: valid while the tensor is unchanged
  void* current_work_stream;
};

namespace {

constexpr int32_t kCpu = 1, kCuda = 2;
struct Kind {
  uint8_t code, bits;
  bool operator==(const Kind& other) const { return code == other.code && bits == other.bits; }
};
constexpr Kind kInt32{0, 32}, kInt64{0, 64}, kUint8{1, 8}, kFp32{2, 32}, kBf16{4, 16};

constexpr int64_t kHeadDim = 128;
constexpr int64_t kTokensAlignment = 8;      // elements: flash_kda.h
constexpr int64_t kWorkspaceAlignment = 16;  // bytes
constexpr int64_t kMaxCheckpoints = (1 << 18) - 1;
constexpr double kFloatMax = 3.40282346638528859812e38;
constexpr int kDevices = 64;

// What flash_kda/native.py hands over, in this order.
struct Python {
  PyObject *none, *true_, *false_, *float_, *int_, *tensor, *parameter;
  PyObject* is_neg;          // torch.Tensor.is_neg
  PyObject* current_stream;  // of a device, as an address
  PyObject* prepare;         // a device: the bytes of scratch memory that it needs; the library is then loaded
  PyObject* fail;            // raises what an error of the library means
};
Python python;
const DLPackExchangeAPI* dlpack;
int (*forward)(const flash_kda_arguments*, void* stream);

struct Device {
  PyObject* index;  // null: not prepared yet
  int64_t scratch_bytes;
} devices[kDevices];

// ------------------------------------------------------------------------------------------- what is ordinary

struct Range {
  uint64_t start, end;
  bool meets(const Range& other) const { return start < other.end && other.start < end; }
};

struct View : DLTensor {
  uint64_t address() const { return reinterpret_cast<uint64_t>(data) + byte_offset; }
  Kind kind() const { return {code, bits}; }
  int64_t width() const { return bits / 8; }

  // A plain tensor on the device of `q` if there is one.
  bool of(PyObject* x, const View* q = nullptr, bool may_be_parameter = false) {
    PyObject* const type = PyObject_Type(x);
    Py_DecRef(type);  // x keeps it
    if (type != python.tensor && !(may_be_parameter && type == python.parameter)) return false;
    if (dlpack->view(x, this) != 0) return false;
    PyObject* const is_neg = PyObject_CallFunctionObjArgs(python.is_neg, x, nullptr);
    if (is_neg == nullptr) return false;
    Py_DecRef(is_neg);
    return is_neg == python.false_ && strides != nullptr && lanes == 1 && address() != 0 &&
           (q == nullptr || (device_type == q->device_type && device_id == q->device_id));
  }

  template <typename... Sizes>
  bool has_shape(Sizes... sizes) const {
    const int64_t wanted[] = {int64_t{sizes}...};
    if (ndim != int(sizeof...(sizes))) return false;
    for (int i = 0; i < ndim; ++i)
      if (shape[i] != wanted[i]) return false;
    return true;
  }

  bool is_contiguous() const {
    int64_t stride = 1;
    for (int i = ndim - 1; i >= 0; stride *= shape[i--])
      if (shape[i] != 1 && strides[i] != stride) return false;
    return true;
  }

  // The last axis is dense, and each other one steps over at least what the axes behind it cover.
  bool has_elements_apart() const {
    if (strides[ndim - 1] != 1) return false;
    int64_t covered = 1;
    for (int i = ndim - 1; i >= 0; covered += (shape[i] - 1) * strides[i], --i)
      if (shape[i] != 1 && strides[i] < covered) return false;
    return true;
  }

  int64_t elements() const {
    int64_t count = 1;
    for (int i = 0; i < ndim; ++i) count *= shape[i];
    return count;
  }

  // From the first element to the last one.
  Range range() const {
    int64_t last = 0;
    for (int i = 0; i < ndim; ++i) last += (shape[i] - 1) * strides[i];
    return {address(), address() + uint64_t((last + 1) * width())};
  }

  bool has_integers() const { return kind() == kInt32 || kind() == kInt64; }
  flash_kda_integers integers() const { return {reinterpret_cast<void*>(address()), strides[0], kind() == kInt64}; }

  bool has_states() const { return (kind() == kFp32 || kind() == kBf16) && has_elements_apart(); }
  flash_kda_state states() const {
    return {reinterpret_cast<void*>(address()), strides[0], strides[ndim - 3], strides[ndim - 2],
            kind() == kFp32 ? FLASH_KDA_FP32 : FLASH_KDA_BF16};
  }
};

// The arguments of `run` below.
struct Call {
  PyObject *q, *k, *v, *g, *beta, *scale, *out, *A_log, *dt_bias, *lower_bound, *initial_state, *final_state,
      *cu_seqlens, *validate, *workspace, *state_indices, *checkpoint_state, *checkpoint_offsets;
};

// Ranges of addresses; those of arguments that are read, or of those that are written.
struct Ranges {
  Range range[12];
  int count = 0;
  void add(const Range& more) { range[count++] = more; }
  bool meet(const Range& other) const {
    for (int i = 0; i < count; ++i)
      if (range[i].meets(other)) return true;
    return false;
  }
};

bool number(PyObject* x, double low, double high, float& value) {
  PyObject* const type = PyObject_Type(x);
  Py_DecRef(type);
  if (type != python.float_ && type != python.int_) return false;
  const double given = PyFloat_AsDouble(x);
  if ((given == -1.0 && PyErr_Occurred()) || !(low <= given && given <= high)) return false;
  value = static_cast<float>(given);
  return true;
}

// `arguments` as ordinary.examine gives them, with `scratch` where `workspace` is given, and the device's type. False
// if the call is not ordinary, and then a Python exception may be set.
bool examine(const Call& call, flash_kda_arguments& a, int32_t& device_type) {
  std::memset(&a, 0, sizeof a);
  a.abi_version = FLASH_KDA_ABI_VERSION;
  if (!number(call.scale, -kFloatMax, kFloatMax, a.scale) || !number(call.lower_bound, -5.0, 0.0, a.lower_bound))
    return false;

  View q;
  if (!q.of(call.q) || q.ndim != 4 || (q.device_type != kCpu && q.device_type != kCuda)) return false;
  const int64_t batch = q.shape[0], tokens = q.shape[1], heads = q.shape[2];
  int64_t of_token, of_batch, elements;  // the strides of a contiguous tensor, and what it has
  if (q.shape[3] != kHeadDim || heads > INT32_MAX || __builtin_mul_overflow(heads, kHeadDim, &of_token) ||
      __builtin_mul_overflow(tokens, of_token, &of_batch) || __builtin_mul_overflow(batch, of_batch, &elements) ||
      elements <= 0 || elements > INT64_MAX / 8)
    return false;
  device_type = q.device_type;
  a.device = q.device_type == kCuda ? q.device_id : 0;
  a.heads = static_cast<int32_t>(heads);
  a.batch = batch;
  a.tokens = tokens;

  Ranges read, written;
  const struct {
    PyObject* given;
    flash_kda_tokens& to;
    bool is_out;
  } rows[] = {
      {call.q, a.q, false}, {call.k, a.k, false}, {call.v, a.v, false}, {call.g, a.g, false}, {call.out, a.out, true}};
  View x;
  for (const auto& row : rows) {
    if (!x.of(row.given, &q) || !(x.kind() == kBf16) || !x.has_shape(batch, tokens, heads, kHeadDim) ||
        x.address() % (kTokensAlignment * x.width()))
      return false;
    int64_t b = of_batch, t = of_token, h = kHeadDim;
    if (!x.is_contiguous()) {
      if (batch != 1) b = x.strides[0];  // whatever it is for one: there is no second one
      t = x.strides[1], h = x.strides[2];
      if (row.is_out || x.strides[3] != 1 || b <= 0 || t <= 0 || h <= 0 || (b | t | h) % kTokensAlignment) return false;
    }
    row.to = {reinterpret_cast<void*>(x.address()), b, t, h};
    (row.is_out ? written : read).add(x.range());
  }

  if (!x.of(call.beta, &q) || !(x.kind() == kBf16) || !x.has_shape(batch, tokens, heads)) return false;
  a.beta = {reinterpret_cast<void*>(x.address()), x.strides[0], x.strides[1], x.strides[2]};
  read.add(x.range());

  if (!x.of(call.A_log, &q, true) || !(x.kind() == kFp32) || x.elements() != heads || !x.is_contiguous()) return false;
  a.A_log = reinterpret_cast<const float*>(x.address());
  read.add(x.range());
  if (!x.of(call.dt_bias, &q, true) || !(x.kind() == kFp32) ||
      !(x.has_shape(heads, kHeadDim) || x.has_shape(of_token)) || !x.is_contiguous())
    return false;
  a.dt_bias = reinterpret_cast<const float*>(x.address());
  a.dt_bias_stride = kHeadDim;
  read.add(x.range());

  a.sequences = batch;
  if (call.cu_seqlens != python.none) {
    if (!x.of(call.cu_seqlens, &q) || !x.has_integers() || x.ndim != 1 || !x.is_contiguous() || batch != 1 ||
        x.shape[0] < 2)
      return false;
    a.sequences = x.shape[0] - 1;
    a.cu_seqlens = reinterpret_cast<const void*>(x.address());
    a.cu_seqlens_is_64_bit = x.kind() == kInt64;
    read.add(x.range());
  }

  flash_kda_serving& serving = a.serving;
  const bool is_pool = call.state_indices != python.none;
  if (is_pool) {
    if (!x.of(call.state_indices, &q) || !x.has_integers() || !x.has_shape(a.sequences)) return false;
    serving.state_indices = x.integers();
    read.add(x.range());
  }
  const struct {
    PyObject* given;
    flash_kda_state& to;
    int64_t& rows_of_pool;
  } states[] = {{call.initial_state, a.initial_state, serving.initial_rows},
                {call.final_state, a.final_state, serving.final_rows}};
  for (const auto& state : states) {
    if (state.given == python.none) continue;
    if (!x.of(state.given, &q) || x.ndim != 4 ||
        !x.has_shape(is_pool ? x.shape[0] : a.sequences, heads, kHeadDim, kHeadDim) || !x.has_states())
      return false;
    state.to = x.states();
    if (is_pool) state.rows_of_pool = x.shape[0];
    if (&state.to == &a.final_state)
      written.add(x.range());
    else if (state.given != call.final_state)
      read.add(x.range());
  }

  if (call.checkpoint_state != python.none || call.checkpoint_offsets != python.none) {
    if (!x.of(call.checkpoint_offsets, &q) || !x.has_integers() || x.ndim < 1 || x.ndim > 2 ||
        x.shape[0] != a.sequences)
      return false;
    const bool several = x.ndim == 2;
    serving.checkpoint_offsets = x.integers();
    serving.checkpoint_offsets_stride = several ? x.strides[1] : 0;
    serving.checkpoints = several ? x.shape[1] : 1;
    read.add(x.range());
    if (serving.checkpoints > kMaxCheckpoints || !x.of(call.checkpoint_state, &q) ||
        !(several ? x.has_shape(a.sequences, serving.checkpoints, heads, kHeadDim, kHeadDim)
                  : x.has_shape(a.sequences, heads, kHeadDim, kHeadDim)) ||
        !x.has_states())
      return false;
    serving.checkpoint_state = x.states();
    serving.checkpoint_state_stride = several ? x.strides[1] : 0;
    written.add(x.range());
  }

  if (call.workspace != python.none) {
    if (!x.of(call.workspace, &q) || x.ndim != 1 || !(x.kind() == kUint8) || !x.is_contiguous() ||
        x.address() % kWorkspaceAlignment || x.shape[0] < 1)
      return false;
    a.scratch = reinterpret_cast<void*>(x.address());
    a.scratch_bytes = x.shape[0];
    written.add(x.range());
  }

  // Ranges of addresses that meet may still share no element, which the full checks find out.
  for (int i = 0; i < written.count; ++i) {
    if (read.meet(written.range[i])) return false;
    for (int j = 0; j < i; ++j)
      if (written.range[i].meets(written.range[j])) return false;
  }
  return true;
}

// ------------------------------------------------------------------------------------------------- the call

// Of arguments.py. Python's os.environ writes through to the environment of the process.
bool wants_validation(PyObject* validate, bool& wanted) {
  if (validate != python.none) {
    const int answer = PyObject_IsTrue(validate);
    wanted = answer > 0;
    return answer >= 0;
  }
  const char* const set = std::getenv("FLASH_KDA_VALIDATE");
  wanted = set != nullptr && *set != '\0' && std::strcmp(set, "0") != 0;
  return true;
}

// The device at that index, prepared. Null: a Python exception is set, or it has too high an index.
const Device* prepared(int32_t index) {
  if (index < 0 || index >= kDevices) return nullptr;
  Device& device = devices[index];
  if (device.index != nullptr) return &device;
  PyObject* const number = PyLong_FromLong(index);
  PyObject* const bytes = number ? PyObject_CallFunctionObjArgs(python.prepare, number, nullptr) : nullptr;
  if (bytes == nullptr) return nullptr;
  device.scratch_bytes = PyLong_AsLongLong(bytes);
  Py_DecRef(bytes);
  device.index = number;
  return &device;
}

enum Answer { kNotOrdinary, kLaunched, kFailed };

// kFailed: the library returned `error`.
Answer launch(const Call& call, int& error) {
  flash_kda_arguments a;
  int32_t device_type;
  if (!examine(call, a, device_type) || device_type != kCuda) return kNotOrdinary;
  bool wanted = false;
  const bool has_contents =
      call.cu_seqlens != python.none || call.state_indices != python.none || call.checkpoint_offsets != python.none;
  if (has_contents && (!wants_validation(call.validate, wanted) || wanted)) return kNotOrdinary;
  const Device* const device = prepared(a.device);
  if (device == nullptr || forward == nullptr) return kNotOrdinary;
  if (a.scratch != nullptr && a.scratch_bytes < device->scratch_bytes) return kNotOrdinary;
  a.scratch_bytes = device->scratch_bytes;
  PyObject* const number = PyObject_CallFunctionObjArgs(python.current_stream, device->index, nullptr);
  if (number == nullptr) return kNotOrdinary;
  void* const stream = PyLong_AsVoidPtr(number);
  Py_DecRef(number);
  if (PyErr_Occurred()) return kNotOrdinary;
  PyThreadState* const thread = PyEval_SaveThread();  // a launch may wait for room in the queue
  error = forward(&a, stream);
  PyEval_RestoreThread(thread);
  if (error == FLASH_KDA_OTHER_DEVICE || error == FLASH_KDA_NEEDS_SCRATCH) return kNotOrdinary;
  return error ? kFailed : kLaunched;
}

constexpr intptr_t kArguments = sizeof(Call) / sizeof(PyObject*);

// Whether the kernel has been launched. If not, nothing has been done.
PyObject* run(PyObject*, PyObject* const* arguments, intptr_t count) {
  int error = 0;
  const Answer answer = count == kArguments ? launch(*reinterpret_cast<const Call*>(arguments), error) : kNotOrdinary;
  if (PyErr_Occurred()) PyErr_Clear();  // it is said the long way, if it matters
  if (answer == kFailed) {
    PyObject* const number = PyLong_FromLong(error);
    return number ? PyObject_CallFunctionObjArgs(python.fail, number, nullptr) : nullptr;
  }
  PyObject* const result = answer == kLaunched ? python.true_ : python.false_;
  Py_IncRef(result);
  return result;
}

// For tests: flash_kda_arguments as bytes, of tensors on a CPU too; None if the call is not ordinary.
PyObject* examined(PyObject*, PyObject* const* arguments, intptr_t count) {
  flash_kda_arguments a;
  int32_t device_type;
  if (count != kArguments || !examine(*reinterpret_cast<const Call*>(arguments), a, device_type)) {
    if (PyErr_Occurred()) PyErr_Clear();
    Py_IncRef(python.none);
    return python.none;
  }
  return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(&a), sizeof a);
}

PyMethodDef run_method = {"run", run, METH_FASTCALL, nullptr};
PyMethodDef examined_method = {"examined", examined, METH_FASTCALL, nullptr};

}  // namespace

#define FLASH_KDA_EXPORT extern "C" __attribute__((visibility("default")))

// The objects outlive this library.
FLASH_KDA_EXPORT void flash_kda_native_set_up(PyObject* const* objects, const void* dlpack_exchange_api) {
  std::memcpy(&python, objects, sizeof python);
  dlpack = static_cast<const DLPackExchangeAPI*>(dlpack_exchange_api);
}

// flash_kda_forward.
FLASH_KDA_EXPORT void flash_kda_native_set_forward(void* function) {
  forward = reinterpret_cast<decltype(forward)>(function);
}

FLASH_KDA_EXPORT PyObject* flash_kda_native_run() { return PyCFunction_NewEx(&run_method, nullptr, nullptr); }
FLASH_KDA_EXPORT PyObject* flash_kda_native_examined() { return PyCFunction_NewEx(&examined_method, nullptr, nullptr); }
