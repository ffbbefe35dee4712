//! Values, texts, errors and extensions between Rust and C.
#![expect(
    unsafe_code,
    reason = "structs of the C contract hold pointers that its rules vouch for"
)]

use std::ffi::{CStr, c_char, c_void};
use std::ptr::{NonNull, null_mut};
use std::sync::Arc;

use abi_stable::std_types::RString;
use smallvec::SmallVec;

use super::abi::{
    NODE_PLUGIN_INTERNAL, NODE_PLUGIN_JSON, NODE_PLUGIN_NONE, NODE_PLUGIN_OBJECT, NODE_PLUGIN_OK,
    NODE_PLUGIN_TENSOR, NodePluginError, NodePluginExtension, NodePluginInput, NodePluginJson,
    NodePluginMemory, NodePluginObject, NodePluginSink, NodePluginValue, NodePluginValueSink,
};
use super::{pad_into, unpadded};
use crate::extension::Extension;
use crate::guard::guarded;
use crate::object::Opaque;
use crate::{ErrorCode, MemoryBlock, NodeError, SharedObject, SharedTensor, Value};

/// Text that was passed in; NULL is empty.
///
/// # Errors
/// It is not UTF-8.
///
/// # Safety
/// NULL, or ends with a NUL and is valid for `'a`.
pub(super) unsafe fn text<'a>(text: *const c_char) -> Result<&'a str, NodeError> {
    if text.is_null() {
        return Ok("");
    }
    // SAFETY: the caller vouches for it.
    let text = unsafe { CStr::from_ptr(text) };
    text.to_str().map_err(|_| {
        let shown = text.to_string_lossy();
        NodeError::new(
            ErrorCode::InvalidInput,
            format!("the text {shown} is not UTF-8"),
        )
    })
}

/// Texts to pass on, each of which ends with a NUL: in one piece of memory, which short ones have no need to ask for.
#[derive(Default)]
pub(super) struct CTexts(SmallVec<[u8; 256]>);

impl CTexts {
    /// Adds a text and says where it is; a NUL inside of it, which would end it, becomes a space.
    pub(super) fn push(&mut self, text: &str) -> usize {
        let place = self.0.len();
        self.0.reserve(text.len() + 1);
        self.0.extend_from_slice(text.as_bytes());
        blank_nuls(&mut self.0[place..]);
        self.0.push(0);
        place
    }

    /// A text by its place; valid for as long as this stays where it is and gets no other.
    pub(super) fn at(&self, place: usize) -> *const c_char {
        self.0[place..].as_ptr().cast()
    }
}

/// One of [`CTexts`].
pub(super) struct CText(SmallVec<[u8; 64]>);

impl CText {
    /// Valid for as long as this is and stays where it is.
    pub(super) fn as_ptr(&self) -> *const c_char {
        self.0.as_ptr().cast()
    }
}

/// As [`CTexts::push`].
#[inline]
pub(super) fn c_text(text: &str) -> CText {
    let mut bytes = SmallVec::with_capacity(text.len() + 1);
    bytes.extend_from_slice(text.as_bytes());
    blank_nuls(&mut bytes);
    bytes.push(0);
    CText(bytes)
}

fn blank_nuls(text: &mut [u8]) {
    if text.contains(&0) {
        for byte in text.iter_mut().filter(|byte| **byte == 0) {
            *byte = b' ';
        }
    }
}

/// Gives text to a sink of the other side.
///
/// # Safety
/// The sink is valid during this call.
pub(super) unsafe fn write(sink: NodePluginSink, text: &str) {
    // SAFETY: the caller vouches for it; the text is valid meanwhile.
    unsafe { (sink.write)(sink.context, text.as_ptr().cast(), text.len()) }
}

/// Collects what `fill` writes.
///
/// # Errors
/// It is not UTF-8.
pub(super) fn collected<R>(
    fill: impl FnOnce(NodePluginSink) -> R,
) -> (R, Result<String, NodeError>) {
    unsafe extern "C" fn append(context: *mut c_void, text: *const c_char, length: usize) {
        if text.is_null() || length == 0 {
            return;
        }
        // SAFETY: the context is the vector below, which lives while the sink is used, by one thread; the text is valid
        // during this call.
        let (bytes, text) = unsafe {
            (
                &mut *context.cast::<Vec<u8>>(),
                std::slice::from_raw_parts(text.cast::<u8>(), length),
            )
        };
        bytes.extend_from_slice(text);
    }
    let mut bytes: Vec<u8> = Vec::new();
    let result = fill(NodePluginSink {
        context: (&raw mut bytes).cast(),
        write: append,
    });
    let text = String::from_utf8(bytes).map_err(|_| {
        let message = "the plugin gave text that is not UTF-8; this is a fault of the plugin";
        NodeError::new(ErrorCode::Internal, message)
    });
    (result, text)
}

/// Ends a function: the number of its result, and the rest of an error where the caller wants it.
///
/// # Safety
/// NULL, or valid.
pub(super) unsafe fn ended(result: Result<(), NodeError>, error: *mut NodePluginError) -> u32 {
    let Err(found) = result else {
        return NODE_PLUGIN_OK;
    };
    // SAFETY: the caller vouches for it.
    if let Some(error) = unsafe { error.as_mut() } {
        pad_into(&mut error.message, &found.message);
        pad_into(&mut error.input, &found.input);
    }
    match found.code {
        NODE_PLUGIN_OK => NODE_PLUGIN_INTERNAL,
        code => code,
    }
}

/// An error to be filled in by the other side.
pub(super) fn no_error() -> NodePluginError {
    NodePluginError {
        input: [0; 128],
        message: [0; 1920],
    }
}

/// What the other side returned.
///
/// # Errors
/// Its error.
pub(super) fn returned(code: u32, error: &NodePluginError) -> Result<(), NodeError> {
    if code == NODE_PLUGIN_OK {
        return Ok(());
    }
    let message = match unpadded(&error.message) {
        message if message.is_empty() => format!("it failed with the code {code}"),
        message => message,
    };
    Err(NodeError {
        code,
        message: message.into(),
        input: unpadded(&error.input).into(),
    })
}

/// A value that is none.
pub(super) fn no_value() -> NodePluginValue {
    NodePluginValue {
        kind: NODE_PLUGIN_NONE,
        reserved: 0,
        tensor: null_mut(),
        object: null_mut(),
        json: null_mut(),
    }
}

/// Hands a value over to C.
///
/// # Errors
/// A tensor whose data could not be made.
pub(super) fn exported(value: Value) -> Result<NodePluginValue, NodeError> {
    let none = no_value();
    Ok(match value {
        Value::Tensor(tensor) => NodePluginValue {
            kind: NODE_PLUGIN_TENSOR,
            tensor: tensor.into_dlpack()?.as_ptr(),
            ..none
        },
        Value::Object(object) => NodePluginValue {
            kind: NODE_PLUGIN_OBJECT,
            object: exported_object(object),
            ..none
        },
        Value::Json(text) => NodePluginValue {
            kind: NODE_PLUGIN_JSON,
            json: exported_json(text),
            ..none
        },
    })
}

/// Takes a value over from C.
///
/// # Errors
/// A kind that is not known, a pointer that is NULL, or what [`SharedTensor::from_dlpack`] refuses.
///
/// # Safety
/// The value is as the contract has it, and handed over.
pub(super) unsafe fn imported(value: NodePluginValue) -> Result<Value, NodeError> {
    let missing = || {
        let text = "a value without its pointer was handed over";
        NodeError::new(ErrorCode::InvalidInput, text)
    };
    match value.kind {
        NODE_PLUGIN_TENSOR => {
            let tensor = NonNull::new(value.tensor).ok_or_else(missing)?;
            // SAFETY: the caller vouches for it.
            Ok(Value::Tensor(unsafe { SharedTensor::from_dlpack(tensor) }?))
        }
        NODE_PLUGIN_OBJECT => {
            let object = NonNull::new(value.object).ok_or_else(missing)?;
            // SAFETY: the caller vouches for it.
            Ok(Value::Object(unsafe { imported_object(object) }?))
        }
        NODE_PLUGIN_JSON => {
            let json = NonNull::new(value.json).ok_or_else(missing)?;
            // SAFETY: the caller vouches for it.
            Ok(Value::Json(unsafe { imported_json(json) }?))
        }
        kind => {
            let text = format!("a value of the kind {kind} was handed over, this reads 1 to 3");
            Err(NodeError::new(ErrorCode::InvalidInput, text))
        }
    }
}

/// Takes a value out of a place where the other side left it; nothing where it was taken before.
///
/// # Safety
/// As [`imported`].
pub(super) unsafe fn taken(place: &mut NodePluginValue) -> Option<Result<Value, NodeError>> {
    let value = std::mem::replace(place, no_value());
    // SAFETY: the caller vouches for it; it is no longer in its place.
    (value.kind != NODE_PLUGIN_NONE).then(|| unsafe { imported(value) })
}

/// Values, or inputs, that are lent to the other side; what it does not take is let go with this.
pub(super) struct LentValues<V: AsMut<NodePluginValue>>(SmallVec<[V; 4]>);

impl<V: AsMut<NodePluginValue>> LentValues<V> {
    pub(super) fn with_capacity(n: usize) -> Self {
        Self(SmallVec::with_capacity(n))
    }

    pub(super) fn push(&mut self, value: V) {
        self.0.push(value);
    }

    pub(super) fn as_mut_slice(&mut self) -> &mut [V] {
        &mut self.0
    }
}

impl<V: AsMut<NodePluginValue>> Drop for LentValues<V> {
    fn drop(&mut self) {
        for value in &mut self.0 {
            // SAFETY: exported by this library, and not taken by the other side.
            drop(unsafe { taken(value.as_mut()) });
        }
    }
}

impl AsMut<Self> for NodePluginValue {
    fn as_mut(&mut self) -> &mut Self {
        self
    }
}

impl AsMut<NodePluginValue> for NodePluginInput {
    fn as_mut(&mut self) -> &mut NodePluginValue {
        &mut self.value
    }
}

/// Collects the values that `fill` pushes.
pub(super) fn pushed<R>(
    fill: impl FnOnce(NodePluginValueSink) -> R,
) -> (R, Result<Vec<Value>, NodeError>) {
    /// Values, and the first that could not be read.
    type Found = (Vec<Value>, Option<NodeError>);
    unsafe extern "C" fn push(context: *mut c_void, value: NodePluginValue) {
        // SAFETY: the context is the pair below, which lives while the sink is used, by one thread.
        let (values, error) = unsafe { &mut *context.cast::<Found>() };
        let pushed = guarded("a value from C", || {
            // SAFETY: handed over.
            values.push(unsafe { imported(value) }?);
            Ok(())
        });
        if let Err(found) = pushed {
            error.get_or_insert(found);
        }
    }
    // Most nodes have one output.
    let mut found: Found = (Vec::with_capacity(1), None);
    let result = fill(NodePluginValueSink {
        context: (&raw mut found).cast(),
        push,
    });
    let (values, error) = found;
    (result, error.map_or(Ok(values), Err))
}

/// Pushes values into a sink of the other side.
///
/// # Errors
/// As [`exported`].
///
/// # Safety
/// The sink is valid during this call.
pub(super) unsafe fn push_all(
    values: Vec<Value>,
    sink: NodePluginValueSink,
) -> Result<(), NodeError> {
    for value in values {
        let value = exported(value)?;
        // SAFETY: the caller vouches for it.
        unsafe { (sink.push)(sink.context, value) };
    }
    Ok(())
}

/// Told apart by its address: which library made an object. Two libraries, or two copies of one, never have the same.
static MAKER: u8 = 0;

fn maker() -> *const c_void {
    (&raw const MAKER).cast()
}

/// A shared object as C sees it; counted by the `Arc` that it is in.
#[repr(C)]
struct ExportedObject {
    head: NodePluginObject,
    shared: SharedObject,
    /// Where it is does not change.
    type_name: Box<CText>,
}

// SAFETY: its pointers go to a static and into its own text, and are only read.
unsafe impl Send for ExportedObject {}
// SAFETY: as above.
unsafe impl Sync for ExportedObject {}

fn exported_object(shared: SharedObject) -> *mut NodePluginObject {
    if let Some(foreign) = shared.get::<ForeignObject>() {
        return foreign.retained();
    }
    let type_name = Box::new(c_text(shared.type_name()));
    let object = ExportedObject {
        head: NodePluginObject {
            struct_size: size_of::<NodePluginObject>() as u32,
            reserved: 0,
            maker: maker(),
            type_name: type_name.as_ptr(),
            retain: retain_exported,
            release: release_exported,
            summary: summary_of_exported,
            memory: memory_of_exported,
        },
        shared,
        type_name,
    };
    Arc::into_raw(Arc::new(object)).cast_mut().cast()
}

unsafe extern "C" fn retain_exported(object: *mut NodePluginObject) {
    // SAFETY: the pointer is of `exported_object`, and its caller holds a reference.
    unsafe { Arc::increment_strong_count(object.cast_const().cast::<ExportedObject>()) };
}

unsafe extern "C" fn release_exported(object: *mut NodePluginObject) {
    let _ = guarded("an object that is freed", || {
        if !object.is_null() {
            // SAFETY: as above; this reference is given up.
            unsafe { Arc::decrement_strong_count(object.cast_const().cast::<ExportedObject>()) };
        }
        Ok(())
    });
}

unsafe extern "C" fn summary_of_exported(object: *const NodePluginObject, text: NodePluginSink) {
    let _ = guarded("the summary of an object", || {
        // SAFETY: as above; the sink is valid during this call.
        unsafe { write(text, &(*object.cast::<ExportedObject>()).shared.summary()) };
        Ok(())
    });
}

unsafe extern "C" fn memory_of_exported(
    object: *const NodePluginObject,
    blocks: *mut NodePluginMemory,
    capacity: usize,
) -> usize {
    guarded("the memory of an object", || {
        // SAFETY: as above.
        let found = unsafe { &(*object.cast::<ExportedObject>()).shared }.memory();
        for (i, &MemoryBlock { id, bytes }) in found.iter().take(capacity).enumerate() {
            // SAFETY: the caller has room for as many as it says.
            unsafe { blocks.add(i).write(NodePluginMemory { id, bytes }) };
        }
        Ok(found.len())
    })
    .unwrap_or(0)
}

/// # Safety
/// A valid object, of which one reference is handed over.
unsafe fn imported_object(object: NonNull<NodePluginObject>) -> Result<SharedObject, NodeError> {
    // SAFETY: the caller vouches for it.
    let head = unsafe { object.as_ref() };
    if head.maker == maker() {
        let exported = object.as_ptr().cast_const().cast::<ExportedObject>();
        // SAFETY: this library's mark says that it is of `exported_object`.
        let exported = unsafe { Arc::from_raw(exported) };
        return Ok(exported.shared.clone());
    }
    let foreign = ForeignObject(object);
    // SAFETY: valid for as long as the object is.
    let type_name = unsafe { text(head.type_name) }?.to_owned();
    Ok(SharedObject::new(&type_name, foreign))
}

/// One reference to an object of a plugin in C.
struct ForeignObject(NonNull<NodePluginObject>);

// SAFETY: the contract lets its functions be called on any thread, several at once.
unsafe impl Send for ForeignObject {}
// SAFETY: as above.
unsafe impl Sync for ForeignObject {}

impl ForeignObject {
    fn head(&self) -> &NodePluginObject {
        // SAFETY: valid while a reference is held, which this is.
        unsafe { self.0.as_ref() }
    }

    fn retained(&self) -> *mut NodePluginObject {
        // SAFETY: as above.
        unsafe { (self.head().retain)(self.0.as_ptr()) };
        self.0.as_ptr()
    }
}

impl Drop for ForeignObject {
    fn drop(&mut self) {
        // SAFETY: the one reference is given up.
        unsafe { (self.head().release)(self.0.as_ptr()) };
    }
}

impl Opaque for ForeignObject {
    fn summary(&self) -> String {
        // SAFETY: valid, see above; the sink is valid during the call.
        let ((), text) = collected(|sink| unsafe { (self.head().summary)(self.0.as_ptr(), sink) });
        text.unwrap_or_else(|error| error.message.into_string())
    }

    fn memory(&self) -> Vec<MemoryBlock> {
        let memory = |blocks: &mut [NodePluginMemory]| {
            // SAFETY: valid, see above; there is room for as many blocks as it is told.
            unsafe { (self.head().memory)(self.0.as_ptr(), blocks.as_mut_ptr(), blocks.len()) }
        };
        let n = memory(&mut []);
        let mut blocks = vec![NodePluginMemory { id: 0, bytes: 0 }; n];
        let n = memory(&mut blocks);
        blocks.truncate(n);
        let block = |NodePluginMemory { id, bytes }| MemoryBlock { id, bytes };
        blocks.into_iter().map(block).collect()
    }
}

/// The head stands first: a pointer to it is one to all of it.
#[repr(C)]
struct ExportedJson {
    head: NodePluginJson,
    text: RString,
}

fn exported_json(text: RString) -> *mut NodePluginJson {
    unsafe extern "C" fn delete(json: *mut NodePluginJson) {
        let _ = guarded("a text that is freed", || {
            if !json.is_null() {
                // SAFETY: the box below; the contract lets it be freed once.
                drop(unsafe { Box::from_raw(json.cast::<ExportedJson>()) });
            }
            Ok(())
        });
    }
    let head = NodePluginJson {
        text: text.as_ptr().cast(),
        length: text.len(),
        manager: null_mut(),
        deleter: Some(delete),
    };
    Box::into_raw(Box::new(ExportedJson { head, text })).cast()
}

/// # Safety
/// Valid, and handed over.
unsafe fn imported_json(json: NonNull<NodePluginJson>) -> Result<RString, NodeError> {
    // SAFETY: the caller vouches for it.
    let held = unsafe { *json.as_ref() };
    let NodePluginJson {
        text,
        length,
        deleter,
        ..
    } = held;
    let bytes = if text.is_null() || length == 0 {
        Vec::new()
    } else {
        // SAFETY: valid until it is let go.
        unsafe { std::slice::from_raw_parts(text.cast::<u8>(), length) }.to_vec()
    };
    if let Some(deleter) = deleter {
        // SAFETY: handed over, so it is let go here.
        unsafe { deleter(json.as_ptr()) };
    }
    String::from_utf8(bytes)
        .map(RString::from)
        .map_err(|_| NodeError::new(ErrorCode::InvalidInput, "a JSON value is not UTF-8"))
}

/// An extension as C sees it. The head stands first: a pointer to it is one to all of it.
#[repr(C)]
pub(super) struct ExportedExtension {
    head: NodePluginExtension,
    extension: Box<dyn Extension>,
}

impl ExportedExtension {
    pub(super) fn new(extension: Box<dyn Extension>) -> Self {
        let head = NodePluginExtension {
            struct_size: size_of::<NodePluginExtension>() as u32,
            reserved: 0,
            call: call_exported,
        };
        Self { head, extension }
    }

    pub(super) fn as_ptr(&self) -> *const NodePluginExtension {
        std::ptr::from_ref(self).cast()
    }
}

unsafe extern "C" fn call_exported(
    extension: *const NodePluginExtension,
    request: *mut NodePluginValue,
    n_request: usize,
    answer: NodePluginValueSink,
    error: *mut NodePluginError,
) -> u32 {
    let result = guarded("an extension", || {
        let mut values = Vec::with_capacity(n_request);
        for i in 0..n_request {
            // SAFETY: the caller has as many values as it says; what is taken is no longer in its place.
            if let Some(value) = unsafe { taken(&mut *request.add(i)) } {
                values.push(value?);
            }
        }
        // SAFETY: the pointer is of `ExportedExtension::as_ptr`, and valid as long as the contract says.
        let extension = unsafe { &*extension.cast::<ExportedExtension>() };
        let answers = extension.extension.call(values)?;
        // SAFETY: the sink is valid during this call.
        unsafe { push_all(answers, answer) }
    });
    // SAFETY: NULL or valid.
    unsafe { ended(result, error) }
}

/// Asks an extension of the other side.
///
/// # Safety
/// It is valid.
pub(super) unsafe fn call(
    extension: NonNull<NodePluginExtension>,
    request: Vec<Value>,
) -> Result<Vec<Value>, NodeError> {
    let mut lent = LentValues::with_capacity(request.len());
    for value in request {
        lent.push(exported(value)?);
    }
    let mut error = no_error();
    let (code, answer) = pushed(|sink| {
        let values = lent.as_mut_slice();
        // SAFETY: the caller vouches for the extension; all else lives here.
        unsafe {
            (extension.as_ref().call)(
                extension.as_ptr(),
                values.as_mut_ptr(),
                values.len(),
                sink,
                &raw mut error,
            )
        }
    });
    drop(lent);
    returned(code, &error)?;
    answer
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::tensor::{TensorDescription, TensorOwner};
    use crate::{DataType, DeviceId};

    /// Counted while it lives; its data come, or never do.
    struct Owner(Arc<AtomicUsize>, bool);

    impl TensorOwner for Owner {
        fn host_sync(&self) -> Result<(), NodeError> {
            let failed = || NodeError::new(ErrorCode::Internal, "the data never came");
            self.1.then_some(()).ok_or_else(failed)
        }
    }

    impl Drop for Owner {
        fn drop(&mut self) {
            self.0.fetch_sub(1, Ordering::SeqCst);
        }
    }

    fn tensor(alive: &Arc<AtomicUsize>, comes: bool) -> Value {
        alive.fetch_add(1, Ordering::SeqCst);
        let values: &'static [f32] = &[1.0];
        let description = TensorDescription {
            address: values.as_ptr() as u64,
            byte_offset: 0,
            allocation_bytes: 4,
            device: DeviceId::CPU,
            data_type: DataType::F32,
            shape: &[1],
            strides: &[1],
            is_read_only: true,
        };
        // SAFETY: a constant.
        let made = unsafe { SharedTensor::from_raw(&description, Owner(alive.clone(), comes)) };
        Value::Tensor(made.unwrap())
    }

    #[test]
    fn what_the_other_side_does_not_take_is_let_go() {
        let alive = Arc::new(AtomicUsize::new(0));
        let mut lent = LentValues::with_capacity(2);
        for _ in 0..2 {
            lent.push(exported(tensor(&alive, true)).unwrap());
        }
        // SAFETY: exported above.
        let first = unsafe { taken(&mut lent.as_mut_slice()[0]) }.unwrap();
        drop(lent);
        assert_eq!(alive.load(Ordering::SeqCst), 1);
        drop(first);
        assert_eq!(alive.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn a_request_of_which_one_value_cannot_be_made_loses_none() {
        let answers = |_: Vec<Value>| Ok(Vec::new());
        let extension = ExportedExtension::new(Box::new(answers));
        let alive = Arc::new(AtomicUsize::new(0));
        let request = vec![tensor(&alive, true), tensor(&alive, false)];
        let pointer = NonNull::new(extension.as_ptr().cast_mut()).unwrap();
        // SAFETY: the extension lives.
        let answer = unsafe { call(pointer, request) };
        assert_eq!(&*answer.unwrap_err().message, "the data never came");
        assert_eq!(alive.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn texts_lie_behind_each_other_and_end_where_they_end() {
        let mut texts = CTexts::default();
        let long = "a".repeat(300);
        let given = ["", "b\0c", &long, "é"];
        let places = given.map(|given| texts.push(given));
        for (place, expected) in places.into_iter().zip(["", "b c", &long, "é"]) {
            // SAFETY: it ends with a NUL and lives.
            assert_eq!(unsafe { text(texts.at(place)) }.unwrap(), expected);
        }
    }
}
