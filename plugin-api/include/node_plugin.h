// Plugins of graph nodes, in C. Generated from plugin-api/src/c_door.
//
// Values come in and go out as these structs, errors as a number and a sentence, everything that describes itself as JSON.
// The rules that hold for all of it:
//
// - Text that is passed in is UTF-8 with a NUL at its end, valid during the call. Text that comes out is given piece by piece
//   to a NodePluginSink, or filled into a NodePluginError.
// - Structs whose first field is struct_size, and the table, only grow at their end: a field beyond the size that the other
//   side says is not there.
// - Nobody frees memory of the other side: everything that is handed over brings the function that lets it go, which may be
//   called on any thread.
// - No exception, panic or longjmp leaves a function.

#ifndef NODE_PLUGIN_H
#define NODE_PLUGIN_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// DLPack's own header may stand before this one.
#ifndef DLPACK_DLPACK_H_
// The version of DLPack that a tensor is laid out in.
typedef struct DLPackVersion {
  // Another one is another layout.
  uint32_t major;
  // Another one adds device and element types.
  uint32_t minor;
} DLPackVersion;

// Where memory is.
typedef struct DLDevice {
  // 1 CPU, 2 CUDA, 3 CUDA pinned host memory, 8 Metal, 12 extension, 13 CUDA managed memory.
  int32_t device_type;
  // Which device of this type.
  int32_t device_id;
} DLDevice;

// What an element is.
typedef struct DLDataType {
  // 0 signed, 1 unsigned, 2 float, 4 bfloat, 6 bool.
  uint8_t code;
  // Bits per element.
  uint8_t bits;
  // 1.
  uint16_t lanes;
} DLDataType;

// Memory and its layout.
typedef struct DLTensor {
  // On its device.
  void *data;
  // Where.
  struct DLDevice device;
  // How many dimensions.
  int32_t ndim;
  // What.
  struct DLDataType dtype;
  // As many as `ndim`.
  int64_t *shape;
  // As many as `ndim`, in elements; NULL for row-major.
  int64_t *strides;
  // First element, from `data`.
  uint64_t byte_offset;
} DLTensor;

// A tensor that whoever holds it lets go by its deleter.
typedef struct DLManagedTensorVersioned {
  // What follows is laid out so only if the major version is 1; up to `flags` it is always so.
  struct DLPackVersion version;
  // The producer's.
  void *manager_ctx;
  // Called once, with this tensor, on any thread; may be NULL.
  void (*deleter)(struct DLManagedTensorVersioned *tensor);
  // Bit 0: the memory must not be written. Bit 1: it is a copy that nobody but the holder has.
  uint64_t flags;
  // The tensor.
  struct DLTensor dl_tensor;
} DLManagedTensorVersioned;
#endif

// Major version of the contract; different ones do not work together.
#define NODE_PLUGIN_MAJOR 1

// Minor version of the contract; a higher one has more at the end.
#define NODE_PLUGIN_MINOR 0

// Success; every other number is an error.
#define NODE_PLUGIN_OK 0

// A value on a socket or a parameter cannot be used.
#define NODE_PLUGIN_INVALID_INPUT 1

// A file or directory cannot be read, or is not what it should be.
#define NODE_PLUGIN_INVALID_FILE 2

// A file or directory cannot be written.
#define NODE_PLUGIN_CANNOT_WRITE 3

// The host asked the node to stop; nothing is wrong.
#define NODE_PLUGIN_CANCELED 4

// Memory of the host or of a device ran out.
#define NODE_PLUGIN_OUT_OF_MEMORY 5

// The node panicked: a fault of the plugin.
#define NODE_PLUGIN_PANICKED 6

// Anything else that is not the user's fault.
#define NODE_PLUGIN_INTERNAL 7

// No value.
#define NODE_PLUGIN_NONE 0

// `tensor` is set.
#define NODE_PLUGIN_TENSOR 1

// `object` is set.
#define NODE_PLUGIN_OBJECT 2

// `json` is set.
#define NODE_PLUGIN_JSON 3

// Severities of log lines.
#define NODE_PLUGIN_LOG_DEBUG 0

// Worth a line.
#define NODE_PLUGIN_LOG_INFO 1

// Something is not as asked, and the node goes on.
#define NODE_PLUGIN_LOG_WARNING 2

// A node; what it is only its plugin knows.
typedef struct NodePluginNode NodePluginNode;

// Takes text, piece after piece, during the call that it is passed to.
typedef struct NodePluginSink {
  // Whoever made the sink knows.
  void *context;
  // `text` need not end with a NUL and is valid during this call.
  void (*write)(void *context, const char *text, size_t length);
} NodePluginSink;

// What went wrong; filled in by a function that returns an error. Texts are UTF-8 with a NUL at their end; longer ones are
// cut.
typedef struct NodePluginError {
  // The socket or parameter that it is about; empty if none.
  char input[128];
  // One sentence: what is wrong, with the name of the file, input or parameter, and what to do.
  char message[1920];
} NodePluginError;

// Memory that an object keeps alive.
typedef struct NodePluginMemory {
  // The same for all objects that share the block, and for no other block that lives.
  uint64_t id;
  // Its size.
  uint64_t bytes;
} NodePluginMemory;

// A value of a plugin's own type: immutable and reference counted. A plugin that makes some puts its own fields behind.
typedef struct NodePluginObject {
  // Size of this struct as its maker knows it.
  uint32_t struct_size;
  // 0.
  uint32_t reserved;
  // An address inside the library that made it, by which that library knows its own; others only compare.
  const void *maker;
  // The socket type.
  const char *type_name;
  // Counts a reference. Any thread, several at once.
  void (*retain)(struct NodePluginObject *object);
  // Lets a reference go; the last one frees it. Any thread.
  void (*release)(struct NodePluginObject *object);
  // A line for a person. Any thread, several at once.
  void (*summary)(const struct NodePluginObject *object, struct NodePluginSink text);
  // Fills in the memory that it keeps alive, at most `capacity` blocks; returns how many there are. Any thread.
  size_t (*memory)(const struct NodePluginObject *object, struct NodePluginMemory *blocks, size_t capacity);
} NodePluginObject;

// JSON text that whoever holds it lets go by its deleter.
typedef struct NodePluginJson {
  // UTF-8; need not end with a NUL.
  const char *text;
  // In bytes.
  size_t length;
  // The maker's.
  void *manager;
  // Called once, with this struct, on any thread; may be NULL.
  void (*deleter)(struct NodePluginJson *json);
} NodePluginJson;

// What a wire carries: of the three pointers the one that `kind` names, the others are NULL.
//
// A tensor is let go by its deleter, an object by release, JSON by its deleter. Tensors on devices are ready: whoever hands
// one over has waited for it, and whoever lets it go has waited for its own work.
typedef struct NodePluginValue {
  // NODE_PLUGIN_TENSOR, NODE_PLUGIN_OBJECT, NODE_PLUGIN_JSON or NODE_PLUGIN_NONE.
  uint32_t kind;
  // 0.
  uint32_t reserved;
  // A tensor. Without the flag READ_ONLY its holder may write it.
  DLManagedTensorVersioned *tensor;
  // One reference to an object.
  struct NodePluginObject *object;
  // A number, text or switch.
  struct NodePluginJson *json;
} NodePluginValue;

// A value on a socket.
typedef struct NodePluginInput {
  // The socket.
  const char *name;
  // Its value.
  struct NodePluginValue value;
} NodePluginInput;

// Takes values during the call that it is passed to: each call hands one over.
typedef struct NodePluginValueSink {
  // Whoever made the sink knows.
  void *context;
  // Takes the value, which then is the sink's.
  void (*push)(void *context, struct NodePluginValue value);
} NodePluginValueSink;

// What a plugin, a node or a host can do beyond the fixed part, by a versioned id such as "devices/1".
typedef struct NodePluginExtension {
  // Size of this struct as its maker knows it.
  uint32_t struct_size;
  // 0.
  uint32_t reserved;
  // Asks. Values of the request are the caller's, but what is taken from them by setting their kind to NODE_PLUGIN_NONE.
  // Any thread, several at once.
  uint32_t (*call)(const struct NodePluginExtension *extension,
                   struct NodePluginValue *request,
                   size_t n_request,
                   struct NodePluginValueSink answer,
                   struct NodePluginError *error);
} NodePluginExtension;

// The host's services for one run of one node, valid until it returns. All functions: the thread that runs the node and
// threads that it started and joins before it returns, several at once. They return at once.
typedef struct NodePluginHost {
  // Size of this struct as the host knows it.
  uint32_t struct_size;
  // The host's minor version of the contract.
  uint32_t minor;
  // The host's.
  void *context;
  // The node's id in the graph.
  const char *node_id;
  // Where results go; exists.
  const char *output_dir;
  // A directory of this node's own that survives a cancellation and is empty for other inputs and parameters; empty text if
  // the host keeps none. A node stores there what it needs to resume.
  const char *work_dir;
  // Not 0 once the user asked to stop. A node asks at least once per step or every quarter of a second, and then returns
  // NODE_PLUGIN_CANCELED within one step.
  int32_t (*is_canceled)(void *context);
  // Shows how far a stage is and a line for a person.
  void (*progress)(void *context, const char *stage, uint64_t done, uint64_t total, const char *text);
  // Shows a picture [H, W, 3] of 32-bit floats in [0, 1], which is then the host's.
  void (*preview)(void *context, DLManagedTensorVersioned *picture, const char *series, const char *label);
  // Adds a point to a curve.
  void (*metric)(void *context, const char *series, double x, double y);
  // Writes a log line of a severity NODE_PLUGIN_LOG_….
  void (*log)(void *context, uint32_t level, const char *text);
  // Tells about a file that the node wrote into the output directory.
  void (*saved)(void *context, const char *path);
  // The host's extension of this id, valid until the node returns; NULL for one that it does not have.
  const struct NodePluginExtension *(*extension)(void *context, const char *id);
} NodePluginHost;

// Everything that a plugin offers. Static: it stays where it is.
typedef struct NodePluginTable {
  // NODE_PLUGIN_MAGIC.
  char magic[16];
  // Size of this struct in the library.
  uint32_t struct_size;
  // NODE_PLUGIN_MAJOR of the library.
  uint32_t major;
  // NODE_PLUGIN_MINOR of the library.
  uint32_t minor;
  // 0.
  uint32_t reserved;
  // Stable name of the plugin, UTF-8, filled up with NULs.
  char name[64];
  // Version of the plugin, UTF-8, filled up with NULs.
  char version[32];
  // The description of plugin and nodes as JSON (description.schema.json), the same at every call. Any thread, several at once; in milliseconds.
  uint32_t (*describe)(struct NodePluginSink json, struct NodePluginError *error);
  // The plugin's extension of this id, valid for ever; NULL for one that it does not have. Any thread, several at once.
  const struct NodePluginExtension *(*extension)(const char *id);
  // Makes a node of this class; NULL and an error for one that is not known. Any thread, several at once; at once.
  struct NodePluginNode *(*node_new)(const char *class_name, struct NodePluginError *error);
  // Frees a node; NULL is allowed. Any thread.
  void (*node_free)(struct NodePluginNode *node);
  // Checks parameters, a JSON object, beyond what the description says. Any thread, one function of a node at a time.
  uint32_t (*node_validate)(struct NodePluginNode *node, const char *parameters, struct NodePluginError *error);
  // Text that changes when the result would change although inputs and parameters are the same. Any thread, one function
  // of a node at a time.
  uint32_t (*node_fingerprint)(struct NodePluginNode *node,
                               const char *parameters,
                               struct NodePluginSink text,
                               struct NodePluginError *error);
  // Runs the node on a worker thread, one function of a node at a time. Parameters that are left out have their default.
  // Inputs are the caller's, who lets them go after the run, but what the node takes from them by setting their kind to
  // NODE_PLUGIN_NONE. Outputs are pushed in the order of the description; after an error the caller lets them go too.
  uint32_t (*node_run)(struct NodePluginNode *node,
                       struct NodePluginInput *inputs,
                       size_t n_inputs,
                       const char *parameters,
                       const struct NodePluginHost *host,
                       struct NodePluginValueSink outputs,
                       struct NodePluginError *error);
  // The node's extension of this id, valid until the node is freed; NULL for one that it does not have. Any thread, one
  // function of a node at a time.
  const struct NodePluginExtension *(*node_extension)(struct NodePluginNode *node, const char *id);
} NodePluginTable;

// What stands first in every table.
#define NODE_PLUGIN_MAGIC "NODEPLUGINTABLE"

// The one function that a library exports. Any thread, at any time; returns the same table at every call.
const NodePluginTable *node_plugin(void);

#ifdef __cplusplus
}
#endif

#endif
