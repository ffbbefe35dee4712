//! Tensors on a device that the CPU cannot read, through nodes that only pass them on and through some that use them.

use plugin_api::DeviceId;

use crate::mock_device::{DEVICE, MockDevice};
use crate::{call, doors, number, support, tensor};

const CONSUMER: u64 = 1;
const OTHER: u64 = 2;

fn counted() -> Vec<f32> {
    (0..12u8).map(f32::from).collect()
}

#[test]
fn a_graph_of_five_nodes_keeps_its_order_and_never_touches_the_memory() {
    let device = MockDevice::new(3);
    let made = device.make(counted(), &[1, 2, 2, 3]);
    let address = made.data_address();
    let faulty = support::faulty();
    // Two nodes that pass on, by either door; what they would read or write would end this process.
    let pass =
        |plugin, given| tensor(call(plugin, "Passthrough", &[("images", given)], "{}").unwrap());
    let last = pass(doors::rust(&faulty), &made);
    let in_c = pass(doors::c(&faulty), &last);
    for passed in [&last, &in_c] {
        assert_eq!((passed.data_address(), passed.device()), (address, DEVICE));
        assert!(passed.as_slice::<f32>().is_err());
    }
    drop(made);
    // What comes back through C is the tensor that went there: its producer knows streams.
    in_c.wait_on(OTHER).unwrap();
    in_c.release_after(OTHER).unwrap();
    // One that works on the device, on a stream of its own.
    let used = last.clone();
    used.wait_on(CONSUMER).unwrap();
    device.kernel(CONSUMER, &used);
    used.release_after(CONSUMER).unwrap();
    // One that has another make a copy, and works on that.
    let shared = last.clone();
    let mut copy = shared.make_unique().unwrap();
    assert_ne!(copy.data_address(), address);
    assert!(copy.is_writable());
    copy.wait_on(OTHER).unwrap();
    device.kernel(OTHER, &copy);
    copy.release_after(OTHER).unwrap();
    // One that works on the CPU.
    let candle = doors::rust(&support::library("candle_plugin"));
    let outputs = call(candle, "CandleSum", &[("tensor", &last)], "{}").unwrap();
    assert_eq!(number(&outputs), 66.0);
    drop(outputs);
    assert_eq!(device.alive(), 1);
    // The only holder writes in place.
    let last = last.make_unique().unwrap();
    assert_eq!(last.data_address(), address);
    assert_eq!(
        *last.to_device(DeviceId::CPU).unwrap().to_f32().unwrap(),
        counted()
    );
    drop(last);
    assert_eq!(device.alive(), 0);
    assert_eq!(device.wrong(), [] as [String; 0]);
}

#[test]
fn use_before_it_is_ready_is_seen() {
    let device = MockDevice::new(2);
    let made = device.make(counted(), &[12]);
    device.kernel(CONSUMER, &made);
    made.release_after(CONSUMER).unwrap();
    let wrong = device.wrong();
    assert_eq!(wrong, ["stream 1 uses a tensor that may not be there yet"]);
}

#[test]
fn freeing_before_the_last_use_is_done_is_seen() {
    let device = MockDevice::new(2);
    let made = device.make(counted(), &[12]);
    made.wait_on(CONSUMER).unwrap();
    device.kernel(CONSUMER, &made);
    drop(made);
    let wrong = device.wrong();
    assert_eq!(wrong, ["a tensor is freed that may still be in use"]);
}
