//! Good examples, and those that once were too much for a reader, as they are and changed.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::PathBuf;

use kiln_test_readers::ALL;
use proptest::prelude::*;

fn examples(reader: &str) -> Vec<Vec<u8>> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(reader);
    let mut paths: Vec<_> = fs::read_dir(&folder).unwrap().map(|item| item.unwrap().path()).collect();
    paths.sort();
    assert!(!paths.is_empty(), "{} has no examples", folder.display());
    paths.iter().map(|path| fs::read(path).unwrap()).collect()
}

/// A part cut out, doubled, or replaced; or a number at its place made as large as it can be.
#[derive(Debug, Clone)]
enum Change {
    Splice { at: prop::sample::Index, length: usize, by: Vec<u8> },
    Double { at: prop::sample::Index, length: usize },
    Digits { at: prop::sample::Index, digit: u8 },
}

fn change() -> impl Strategy<Value = Change> {
    let at = any::<prop::sample::Index>;
    prop_oneof![
        (at(), 0_usize..80, prop::collection::vec(any::<u8>(), 0..80))
            .prop_map(|(at, length, by)| Change::Splice { at, length, by }),
        (at(), 1_usize..600).prop_map(|(at, length)| Change::Double { at, length }),
        (at(), prop::sample::select(b"0789-.:{}[]\"\\/\xff".to_vec()))
            .prop_map(|(at, digit)| Change::Digits { at, digit }),
    ]
}

fn changed(mut bytes: Vec<u8>, changes: &[Change]) -> Vec<u8> {
    for change in changes {
        if bytes.is_empty() {
            break;
        }
        match change {
            Change::Splice { at, length, by } => {
                let at = at.index(bytes.len());
                let end = (at + length).min(bytes.len());
                bytes.splice(at..end, by.iter().copied());
            }
            Change::Double { at, length } => {
                let at = at.index(bytes.len());
                let part = bytes[at..(at + length).min(bytes.len())].to_vec();
                bytes.splice(at..at, part);
            }
            Change::Digits { at, digit } => {
                let at = at.index(bytes.len());
                let number = bytes[at..].iter_mut().take_while(|byte| byte.is_ascii_digit());
                number.for_each(|byte| *byte = *digit);
                bytes[at] = *digit;
            }
        }
    }
    bytes
}

#[test]
fn every_example_is_read_or_refused() {
    for (name, read) in ALL {
        examples(name).iter().for_each(|bytes| read(bytes));
    }
}

proptest! {
    #[test]
    fn what_was_changed_ends_no_reader(
        which in any::<prop::sample::Index>(),
        reader in prop::sample::select(ALL.to_vec()),
        changes in prop::collection::vec(change(), 1..4),
    ) {
        let (name, read) = reader;
        let examples = examples(name);
        read(&changed(examples[which.index(examples.len())].clone(), &changes));
    }
}
