//! Formats that others write, read within bounds from bytes that nobody has checked: packages of Debian and their paragraphs,
//! streams that may be compressed, Containerfiles.

pub mod compression;
pub mod containerfile;
pub mod deb;
pub mod deb822;
