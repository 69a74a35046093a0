//! What is known of the members of a group, as plain data.

use std::collections::BTreeMap;
use std::time::Duration;

use kiln_model::digest::Digest;

use super::{FORGOTTEN, Member, SILENCE};

#[derive(Debug, Default)]
pub(super) struct Roster {
    /// When this replica last said that it is there. None before, and then nothing is its own.
    beat: Option<Duration>,
    seen: BTreeMap<String, Seen>,
    /// The others that were there at that time. What is whose changes with it alone, so that whoever asks after each change
    /// misses nothing.
    there: BTreeMap<String, Member>,
}

#[derive(Debug)]
struct Seen {
    version: u64,
    /// When its document was first seen at this version.
    at: Duration,
}

impl Roster {
    /// This replica has said at `said` that it is there, and found these others by now, each at a version of its document.
    /// Gives whether what is whose may have changed, and those that were silent for so long that they are to be forgotten.
    pub(super) fn beat(
        &mut self,
        found: Vec<(Member, u64)>,
        said: Duration,
        now: Duration,
    ) -> (bool, Vec<(String, u64)>) {
        // Whoever was away itself, or waited for the store, can't tell who was silent meanwhile, and owned nothing.
        let was_away = self.beat.is_none_or(|beat| now.saturating_sub(beat) >= SILENCE);
        let mut before = std::mem::take(&mut self.seen);
        let mut there = BTreeMap::new();
        let mut silent = Vec::new();
        for (member, version) in found {
            let known = before.remove(&member.id).filter(|known| known.version == version && !was_away);
            let at = known.map_or(now, |known| known.at);
            self.seen.insert(member.id.clone(), Seen { version, at });
            let silence = now.saturating_sub(at);
            if silence < SILENCE {
                there.insert(member.id.clone(), member);
            } else if silence >= FORGOTTEN {
                silent.push((member.id, version));
            }
        }
        self.beat = Some(said);
        let changed = was_away || there != self.there;
        self.there = there;
        (changed, silent)
    }

    pub(super) fn there(&self) -> Vec<Member> {
        self.there.values().cloned().collect()
    }

    pub(super) fn is_there(&self, id: &str) -> bool {
        self.there.contains_key(id)
    }

    /// By rendezvous hashing. A replica that has not said for a while that it is there owns nothing: the others may have
    /// taken its work over.
    pub(super) fn is_owner(&self, me: &str, work: &str, now: Duration) -> bool {
        if self.beat.is_none_or(|beat| now.saturating_sub(beat) >= SILENCE) {
            return false;
        }
        owner(self.there.keys().map(String::as_str).chain([me]), work) == Some(me)
    }
}

/// Whose of these a piece of work is.
pub fn owner<'a>(members: impl IntoIterator<Item = &'a str>, work: &str) -> Option<&'a str> {
    members.into_iter().max_by_key(|id| weight(id, work))
}

/// The same for every replica and every version of Kiln that runs beside it.
fn weight(member: &str, work: &str) -> Digest {
    Digest::of(format!("{member}\n{work}").as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn found(members: &[(&str, u64)]) -> Vec<(Member, u64)> {
        let member = |id: &str| Member { id: id.to_owned(), address: String::new() };
        members.iter().map(|(id, version)| (member(id), *version)).collect()
    }

    /// How many of a thousand pieces of work are whose.
    fn shares(rosters: &[(&str, &Roster)], now: Duration) -> Vec<usize> {
        let works: Vec<String> = (0..1000).map(|n| format!("work-{n}")).collect();
        let of = |(id, roster): &(&str, &Roster)| {
            works.iter().filter(|work| roster.is_owner(id, work, now)).count()
        };
        rosters.iter().map(of).collect()
    }

    #[test]
    fn each_piece_has_one_owner_and_only_that_of_who_went_changes_hands() {
        let (mut a, mut b, mut c) = (Roster::default(), Roster::default(), Roster::default());
        a.beat(found(&[("b", 1), ("c", 1)]), SECOND, SECOND);
        b.beat(found(&[("a", 1), ("c", 1)]), SECOND, SECOND);
        c.beat(found(&[("a", 1), ("b", 1)]), SECOND, SECOND);
        let three = shares(&[("a", &a), ("b", &b), ("c", &c)], SECOND);
        assert_eq!(three.iter().sum::<usize>(), 1000, "{three:?}");
        assert!(three.iter().all(|share| (250..420).contains(share)), "{three:?}");

        let had: Vec<bool> = (0..1000).map(|n| a.is_owner("a", &format!("work-{n}"), SECOND)).collect();
        a.beat(found(&[("b", 2)]), SECOND * 2, SECOND * 2);
        b.beat(found(&[("a", 2)]), SECOND * 2, SECOND * 2);
        let two = shares(&[("a", &a), ("b", &b)], SECOND * 2);
        assert_eq!(two.iter().sum::<usize>(), 1000, "{two:?}");
        let kept = had
            .iter()
            .enumerate()
            .filter(|(n, had)| **had && !a.is_owner("a", &format!("work-{n}"), SECOND * 2));
        assert_eq!(kept.count(), 0);
    }

    #[test]
    fn the_work_of_who_is_silent_is_others_and_who_stood_still_has_none() {
        let mut a = Roster::default();
        assert_eq!(shares(&[("a", &a)], SECOND), [0], "before anybody knows of it");
        assert!(a.beat(found(&[("b", 1)]), SECOND, SECOND).0);
        assert!(!a.beat(found(&[("b", 2)]), SECOND * 2, SECOND * 2).0);
        for second in 3..5 {
            assert!(!a.beat(found(&[("b", 2)]), SECOND * second, SECOND * second).0, "{second}");
        }
        assert!(a.is_there("b") && shares(&[("a", &a)], SECOND * 4) < vec![1000]);
        assert!(a.beat(found(&[("b", 2)]), SECOND * 5, SECOND * 5).0, "silent for 3 s");
        assert_eq!(shares(&[("a", &a)], SECOND * 5), [1000]);
        assert_eq!(shares(&[("a", &a)], SECOND * 8), [0], "it stood still");
        // What others said meanwhile was not heard.
        a.beat(found(&[("b", 2)]), SECOND * 9, SECOND * 9);
        assert!(a.is_there("b"));
    }

    /// The store took its time over the answer: in between this replica had nothing for its own, and its loops rest.
    #[test]
    fn a_beat_that_ends_too_late_is_a_change_though_it_began_in_time() {
        let mut a = Roster::default();
        a.beat(found(&[("b", 1)]), SECOND, SECOND);
        assert!(a.beat(found(&[("b", 2)]), SECOND * 3, SECOND * 5).0);
    }

    #[test]
    fn who_was_killed_long_ago_is_forgotten() {
        let mut a = Roster::default();
        for second in 1..=61 {
            let (_, silent) = a.beat(found(&[("b", 7)]), SECOND * second, SECOND * second);
            assert_eq!(silent, if second == 61 { vec![("b".to_owned(), 7)] } else { vec![] }, "{second}");
        }
    }
}
