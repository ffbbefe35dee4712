use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::c_door::dlpack::DLManagedTensorVersioned;

fn description<'a>(
    values: &[f32],
    shape: &'a [usize],
    strides: &'a [isize],
) -> TensorDescription<'a> {
    TensorDescription {
        address: values.as_ptr() as u64,
        byte_offset: 0,
        allocation_bytes: size_of_val(values) as u64,
        device: DeviceId::CPU,
        data_type: DataType::F32,
        shape,
        strides,
        is_read_only: false,
    }
}

/// A view of a vector that says how many of its owners live.
struct Counted(
    #[expect(dead_code, reason = "kept")] Vec<f32>,
    Arc<AtomicUsize>,
);

impl Drop for Counted {
    fn drop(&mut self) {
        self.1.fetch_sub(1, Ordering::SeqCst);
    }
}

impl TensorOwner for Counted {}

fn view(shape: &[usize], strides: &[isize], first: u64) -> (SharedTensor, Arc<AtomicUsize>) {
    let values: Vec<f32> = (0..24u8).map(f32::from).collect();
    let mut description = description(&values, shape, strides);
    description.byte_offset = 4 * first;
    let alive = Arc::new(AtomicUsize::new(1));
    // SAFETY: the vector moves into the owner and stays where it is.
    let shared = unsafe { SharedTensor::from_raw(&description, Counted(values, alive.clone())) };
    (shared.unwrap(), alive)
}

#[test]
fn a_vector_is_shared_without_a_copy() {
    let values = vec![1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0];
    let address = values.as_ptr() as u64;
    let tensor = SharedTensor::from_vec(values, &[2, 3]).unwrap();
    let other = tensor.clone();
    drop(tensor);
    assert_eq!(other.data_address(), address);
    let values = other.as_slice::<f32>().unwrap();
    assert_eq!(values, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    assert_eq!(other.shape(), [2, 3]);
    assert!(other.owner_as::<VecOwner<f32>>().is_some());
    assert!(other.owner_as::<VecOwner<u8>>().is_none());
}

#[test]
fn impossible_descriptions_are_refused() {
    assert!(SharedTensor::from_vec(vec![0f32; 5], &[2, 3]).is_err());
    assert!(SharedTensor::from_vec(vec![0f32; 1], &[1; 9]).is_err());
    let values = [0f32; 6];
    let refused = |change: &dyn Fn(&mut TensorDescription<'_>)| {
        let mut description = description(&values, &[2, 3], &[3, 1]);
        change(&mut description);
        // SAFETY: refused before anything is read.
        unsafe { SharedTensor::from_raw(&description, VecOwner(Vec::<f32>::new())) }.is_err()
    };
    assert!(!refused(&|_| ()));
    assert!(refused(&|d| d.byte_offset = 8));
    assert!(refused(&|d| d.strides = &[-3, 1]));
    assert!(refused(&|d| d.strides = &[3]));
    assert!(refused(&|d| d.data_type.bits = 4));
    assert!(refused(&|d| d.strides = &[isize::MAX, 1]));
    // As many elements as no memory has, all of them in one place.
    assert!(refused(
        &|d| (d.shape, d.strides) = (&[1 << 40, 1 << 40], &[0, 0])
    ));
}

#[test]
fn views_are_read_in_their_order() {
    let (columns, _) = view(&[3, 2], &[1, 3], 6);
    assert!(columns.as_slice::<f32>().is_err());
    assert_eq!(
        columns.to_vec::<f32>().unwrap(),
        [6.0, 9.0, 7.0, 10.0, 8.0, 11.0]
    );
    let (backwards, _) = view(&[2, 2], &[-4, -1], 7);
    assert_eq!(*backwards.to_f32().unwrap(), [7.0, 6.0, 3.0, 2.0]);
    let (repeated, _) = view(&[2, 3], &[0, 2], 0);
    assert_eq!(*repeated.to_f32().unwrap(), [0.0, 2.0, 4.0, 0.0, 2.0, 4.0]);
    // A dimension of one may have any stride.
    let (row, _) = view(&[1, 4], &[99, 1], 4);
    assert_eq!(row.as_slice::<f32>().unwrap(), [4.0, 5.0, 6.0, 7.0]);
}

#[test]
fn elements_of_other_types_become_f32() {
    fn of<T: Element>(values: Vec<T>) -> Vec<f32> {
        let shape = [values.len()];
        let tensor = SharedTensor::from_vec(values, &shape).unwrap();
        assert!(tensor.as_slice::<T>().is_ok());
        tensor.to_f32().unwrap().into_owned()
    }
    assert_eq!(of(vec![f16::from_f32(0.5), f16::MAX]), [0.5, 65504.0]);
    assert_eq!(of(vec![bf16::from_f32(-2.0)]), [-2.0]);
    assert_eq!(of(vec![0u8, 255]), [0.0, 255.0]);
    let bytes = SharedTensor::from_vec(vec![1u8], &[1]).unwrap();
    let error = bytes.as_slice::<f32>().unwrap_err().to_string();
    assert_eq!(error, "the tensor holds u8, expected f32");
}

#[test]
fn only_the_only_holder_writes_and_everybody_else_gets_a_copy() {
    let mut first = SharedTensor::from_vec(vec![1f32, 2.0], &[2]).unwrap();
    let address = first.data_address();
    first.as_mut_slice::<f32>().unwrap()[0] = 3.0;
    let second = first.clone();
    assert!(first.as_mut_slice::<f32>().is_err());
    let mut copy = first.make_unique().unwrap();
    assert_ne!(copy.data_address(), address);
    copy.as_mut_slice::<f32>().unwrap()[1] = 9.0;
    assert_eq!(*second.to_f32().unwrap(), [3.0, 2.0]);
    assert_eq!(*copy.to_f32().unwrap(), [3.0, 9.0]);
    // The only one left.
    assert_eq!(second.make_unique().unwrap().data_address(), address);
}

#[test]
fn read_only_memory_is_not_written_even_by_its_only_holder() {
    let values = Box::leak(Box::new([1f32, 2.0]));
    let mut description = description(values, &[2], &[1]);
    description.is_read_only = true;
    // SAFETY: leaked, so it stays.
    let shared = unsafe { SharedTensor::from_raw(&description, VecOwner(Vec::<f32>::new())) };
    let mut shared = shared.unwrap();
    assert!(!shared.is_writable() && shared.as_mut_slice::<f32>().is_err());
    let copy = shared.make_unique().unwrap();
    assert_ne!(copy.data_address(), description.address);
}

#[test]
fn a_view_that_is_made_unique_is_row_major() {
    let (columns, alive) = view(&[3, 2], &[1, 3], 6);
    let held = columns.clone();
    let mut copy = columns.make_unique().unwrap();
    assert_eq!(copy.as_mut_slice::<f32>().unwrap()[1], 9.0);
    drop(held);
    assert_eq!(alive.load(Ordering::SeqCst), 0);
}

/// As another library would see it: through the struct alone.
fn disowned(
    managed: NonNull<DLManagedTensorVersioned>,
    flags: u64,
) -> NonNull<DLManagedTensorVersioned> {
    unsafe extern "C" fn delete(managed: *mut DLManagedTensorVersioned) {
        // SAFETY: made below.
        unsafe {
            let outer = Box::from_raw(managed);
            let inner = outer.manager_ctx.cast::<DLManagedTensorVersioned>();
            ((*inner).deleter.unwrap())(inner);
        }
    }
    // SAFETY: valid, of `into_dlpack`.
    let mut outer = Box::new(unsafe { *managed.as_ref() });
    outer.manager_ctx = managed.as_ptr().cast();
    outer.deleter = Some(delete);
    outer.flags = flags;
    NonNull::from(Box::leak(outer))
}

#[test]
fn dlpack_is_the_same_memory_there_and_back() {
    let (columns, alive) = view(&[3, 2], &[1, 3], 6);
    let address = columns.data_address();
    let managed = columns.into_dlpack().unwrap();
    // SAFETY: made above.
    let raw = unsafe { *managed.as_ref() };
    assert_eq!((raw.version.major, raw.flags), (1, 2));
    assert_eq!(raw.dl_tensor.data as u64, address);
    // SAFETY: handed over.
    let back = unsafe { SharedTensor::from_dlpack(managed) }.unwrap();
    assert!(back.owner_as::<Counted>().is_some(), "it is what it was");
    let held = back.clone();
    let managed = back.into_dlpack().unwrap();
    // SAFETY: made above.
    assert_eq!(unsafe { managed.as_ref() }.flags, 1, "others hold it too");
    // SAFETY: handed over, and the flags are true.
    let mut foreign = unsafe { SharedTensor::from_dlpack(disowned(managed, 1)) }.unwrap();
    assert_eq!(
        (foreign.data_address(), foreign.strides()),
        (address, &[1, 3][..])
    );
    assert!(!foreign.is_writable() && foreign.owner_as::<Counted>().is_none());
    drop(held);
    assert_eq!(alive.load(Ordering::SeqCst), 1);
    drop(foreign);
    assert_eq!(alive.load(Ordering::SeqCst), 0);
}

#[test]
fn what_its_exporter_may_write_is_copied_and_what_it_gave_away_is_not() {
    let exported = || {
        let (tensor, alive) = view(&[2, 2], &[-4, -1], 7);
        (tensor.data_address(), tensor.into_dlpack().unwrap(), alive)
    };
    let (address, managed, alive) = exported();
    // SAFETY: handed over, and the flags are true.
    let copied = unsafe { SharedTensor::from_dlpack(disowned(managed, 0)) }.unwrap();
    assert_ne!(copied.data_address(), address);
    assert_eq!(alive.load(Ordering::SeqCst), 0, "it is let go at once");
    assert_eq!(*copied.to_f32().unwrap(), [7.0, 6.0, 3.0, 2.0]);
    let (address, managed, _alive) = exported();
    // SAFETY: as above.
    let mut given = unsafe { SharedTensor::from_dlpack(disowned(managed, 2)) }.unwrap();
    assert_eq!(given.data_address(), address);
    assert!(given.is_writable());
    assert_eq!(*given.to_f32().unwrap(), [7.0, 6.0, 3.0, 2.0]);
}

#[test]
fn dlpack_that_cannot_be_read_is_let_go_with_a_sentence() {
    let refused = |change: &dyn Fn(&mut DLManagedTensorVersioned)| {
        let (tensor, alive) = view(&[2, 3], &[3, 1], 0);
        let mut managed = disowned(tensor.into_dlpack().unwrap(), 1);
        // SAFETY: made above.
        change(unsafe { managed.as_mut() });
        // SAFETY: handed over; what it says is refused before it is read.
        let error = unsafe { SharedTensor::from_dlpack(managed) }.unwrap_err();
        assert_eq!(alive.load(Ordering::SeqCst), 0);
        error.to_string()
    };
    let message = refused(&|managed| managed.version.major = 2);
    assert_eq!(message, "the tensor is DLPack 2.1, this reads 1.x");
    assert!(refused(&|managed| managed.dl_tensor.ndim = 9).contains("9 dimensions"));
    assert!(refused(&|managed| managed.dl_tensor.dtype.bits = 4).contains("f4"));
    let on_device = refused(&|managed| {
        managed.flags = 0;
        managed.dl_tensor.device.device_type = 2;
    });
    assert!(on_device.contains("READ_ONLY"), "{on_device}");
}

#[test]
fn dlpack_that_nobody_else_holds_goes_on_as_it_came() {
    let (tensor, alive) = view(&[3, 2], &[1, 3], 6);
    let came = disowned(tensor.into_dlpack().unwrap(), 2);
    // SAFETY: valid, of `disowned`, here and below.
    let mut tensor = unsafe { SharedTensor::from_dlpack(came) }.unwrap();
    for _ in 0..3 {
        let gone = tensor.into_dlpack().unwrap();
        assert_eq!(gone, came);
        // SAFETY: as above.
        tensor = unsafe { SharedTensor::from_dlpack(gone) }.unwrap();
        assert!(tensor.is_writable());
    }
    // What somebody else holds is lent.
    let held = tensor.clone();
    let lent = tensor.into_dlpack().unwrap();
    assert_ne!(lent, came);
    // SAFETY: valid, of `into_dlpack`.
    assert_eq!(unsafe { lent.as_ref() }.flags, 1);
    // SAFETY: as above.
    drop(unsafe { SharedTensor::from_dlpack(lent) }.unwrap());
    assert_eq!(alive.load(Ordering::SeqCst), 1);
    drop(held);
    assert_eq!(alive.load(Ordering::SeqCst), 0);
}

#[test]
fn dlpack_of_a_device_waits_for_no_stream() {
    let (tensor, alive) = view(&[2, 3], &[3, 1], 0);
    let mut managed = disowned(tensor.into_dlpack().unwrap(), 1);
    // SAFETY: made above; nobody reads the memory.
    unsafe { managed.as_mut() }.dl_tensor.device.device_type = 2;
    // SAFETY: valid, and handed over.
    let tensor = unsafe { SharedTensor::from_dlpack(managed) }.unwrap();
    let not_released = tensor.release_after(1).unwrap_err();
    assert!(
        not_released
            .to_string()
            .contains("cannot wait for a stream")
    );
    assert_eq!(alive.load(Ordering::SeqCst), 1);
    drop(not_released);
    assert_eq!(alive.load(Ordering::SeqCst), 0);
}
