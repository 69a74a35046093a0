//! How the slots of a port are shared out. A new connection takes one of them at random.

use std::collections::BTreeMap;
use std::net::SocketAddrV4;

/// Divides without rest by 1 to 6, 8, 10, 12, 15, 20, …: fleets of these sizes get exactly even shares, all others
/// differ by one slot. Also the most backends that a port can have.
pub(crate) const SLOTS: usize = 120;

/// Shares the slots out evenly. What is there already moves only where it must, so a flip changes few elements.
pub(super) fn spread(before: &[SocketAddrV4], backends: &[SocketAddrV4]) -> Vec<SocketAddrV4> {
    let mut backends = backends.to_vec();
    backends.sort();
    backends.dedup();
    let mut left: BTreeMap<SocketAddrV4, usize> = backends
        .iter()
        .enumerate()
        .map(|(n, backend)| (*backend, SLOTS / backends.len() + usize::from(n < SLOTS % backends.len())))
        .collect();
    let kept: Vec<Option<SocketAddrV4>> = (0..SLOTS)
        .map(|slot| {
            let holder = *before.get(slot)?;
            let share = left.get_mut(&holder).filter(|share| **share > 0)?;
            *share -= 1;
            Some(holder)
        })
        .collect();
    let mut rest = left.into_iter().flat_map(|(backend, share)| std::iter::repeat_n(backend, share));
    // The shares add up to the number of slots, so every slot finds one unless there are no backends.
    kept.into_iter().filter_map(|slot| slot.or_else(|| rest.next())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backend(n: u8) -> SocketAddrV4 {
        SocketAddrV4::new([10, 77, 0, n].into(), 80)
    }

    fn share(slots: &[SocketAddrV4], n: u8) -> usize {
        slots.iter().filter(|slot| **slot == backend(n)).count()
    }

    #[test]
    fn shares_are_even() {
        for fleet in 1..=SLOTS {
            let backends: Vec<_> = (0..fleet).map(|n| backend(u8::try_from(n).unwrap())).collect();
            let slots = spread(&[], &backends);
            assert_eq!(slots.len(), SLOTS);
            for n in 0..fleet {
                let share = share(&slots, u8::try_from(n).unwrap());
                assert!(share == SLOTS / fleet || share == SLOTS / fleet + 1, "{fleet}: {share}");
            }
        }
        assert!(spread(&[], &[]).is_empty());
    }

    #[test]
    fn a_replacement_moves_only_its_own_slots() {
        let before = spread(&[], &[backend(1), backend(2), backend(3)]);
        let after = spread(&before, &[backend(1), backend(2), backend(4)]);
        let moved = before.iter().zip(&after).filter(|(a, b)| a != b).count();
        assert_eq!(moved, SLOTS / 3);
        assert_eq!(share(&after, 4), SLOTS / 3);
        assert_eq!(share(&after, 3), 0);
    }
}
