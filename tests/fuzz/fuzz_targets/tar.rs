#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| kiln_test_readers::tar(bytes));
