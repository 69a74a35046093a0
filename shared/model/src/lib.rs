//! The words of Kiln as types: names and digests that can't hold a wrong value, the definition, the lock, the
//! revision. Parsing and checking, no I/O.

pub mod architecture;
pub mod cause;
pub mod check;
pub mod definition;
pub mod digest;
pub mod event;
pub mod lock;
pub mod name;
pub mod release_file;
pub mod repository;
pub mod revision;
pub mod run;
pub mod signal;
pub mod time;
