//! Which round does what: every kind once in the order of the seed, then every kind again.

use kiln_tests::random::Random;

pub(crate) struct Deck<'a, T> {
    all: &'a [T],
    left: Vec<T>,
}

impl<'a, T: Copy> Deck<'a, T> {
    pub(crate) fn of(all: &'a [T]) -> Self {
        Self { all, left: Vec::new() }
    }

    /// The next one; none where there never was any.
    pub(crate) fn deal(&mut self, random: &mut Random) -> Option<T> {
        if self.left.is_empty() {
            self.left = shuffled(self.all, random);
        }
        self.left.pop()
    }
}

pub(crate) fn shuffled<T: Copy>(all: &[T], random: &mut Random) -> Vec<T> {
    let mut order = all.to_vec();
    for at in (1..order.len()).rev() {
        let other = random.below(at as u64 + 1);
        order.swap(at, usize::try_from(other).unwrap_or_default());
    }
    order
}

#[test]
fn every_kind_comes_once_before_one_comes_again() {
    let (mut random, mut deck) = (Random::seeded(), Deck::of(&[1, 2, 3, 4, 5]));
    for _ in 0..3 {
        let mut dealt: Vec<_> = (0..5).filter_map(|_| deck.deal(&mut random)).collect();
        dealt.sort_unstable();
        assert_eq!(dealt, [1, 2, 3, 4, 5]);
    }
}
