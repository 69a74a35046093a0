//! What the monitor decides: when to look at an instance, what its answers make of its health, and which signals
//! follow from what was seen. Time is an argument; nothing here asks a clock, a network or a store.

pub mod health;
pub mod remote;
pub mod schedule;
pub mod signal;
