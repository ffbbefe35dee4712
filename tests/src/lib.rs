//! Integration tests: the real dynamic library and the real binary.
//!
//! The tests are in `tests/it`; `faulty-plugin` is a library that misbehaves for them; `reference` holds the scripts
//! that recorded `fixtures`.
