//! Integration tests: the real dynamic library and the real binary.
