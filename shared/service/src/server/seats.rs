//! How many connections there are, in all and of each address.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, PoisonError};

#[derive(Debug, Default)]
struct Taken {
    all: usize,
    by_address: HashMap<IpAddr, usize>,
}

/// The places for connections of one way in.
#[derive(Debug, Clone)]
pub(super) struct Seats {
    all: usize,
    each: usize,
    taken: Arc<Mutex<Taken>>,
}

/// One place, until it is dropped.
#[derive(Debug)]
pub(super) struct Seat {
    address: Option<IpAddr>,
    taken: Arc<Mutex<Taken>>,
}

/// Whoever has one address of IPv6 has its /64.
fn whose(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => {
            let [a, b, c, d, ..] = address.segments();
            IpAddr::V6(Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0))
        }
        v4 @ IpAddr::V4(_) => v4,
    }
}

impl Seats {
    pub(super) fn new(all: usize, each: usize) -> Self {
        Self { all, each, taken: Arc::default() }
    }

    /// A place for a connection from an address; the Unix socket has none.
    ///
    /// # Errors
    /// Which bound is reached.
    pub(super) fn take(&self, from: Option<IpAddr>) -> Result<Seat, String> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if taken.all >= self.all {
            return Err(format!("there are {} connections, and may be no more", self.all));
        }
        let address = from.map(whose);
        if let Some(address) = address {
            let of_it = taken.by_address.entry(address).or_default();
            if *of_it >= self.each {
                return Err(format!("{address} has {} connections, and may have no more", self.each));
            }
            *of_it += 1;
        }
        taken.all += 1;
        Ok(Seat { address, taken: Arc::clone(&self.taken) })
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        taken.all = taken.all.saturating_sub(1);
        let Some(address) = self.address else { return };
        let left = taken.by_address.get_mut(&address).map(|of_it| {
            *of_it = of_it.saturating_sub(1);
            *of_it
        });
        if left == Some(0) {
            taken.by_address.remove(&address);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_leaves_places_for_another() {
        let seats = Seats::new(4, 2);
        let from = |text: &str| Some(text.parse::<IpAddr>().unwrap());
        let first = seats.take(from("10.0.0.1")).unwrap();
        let _second = seats.take(from("::ffff:10.0.0.1")).unwrap();
        assert!(seats.take(from("10.0.0.1")).unwrap_err().contains("10.0.0.1 has 2"));
        let _other = seats.take(from("10.0.0.2")).unwrap();
        drop(first);
        let _again = seats.take(from("10.0.0.1")).unwrap();
        let _six = seats.take(from("2001:db8::1")).unwrap();
        assert!(seats.take(from("2001:db8::2")).unwrap_err().contains("there are 4"));
    }

    #[test]
    fn a_network_of_ipv6_counts_as_one_and_what_left_is_forgotten() {
        let seats = Seats::new(9, 1);
        let seat = seats.take(Some("2001:db8::1".parse().unwrap())).unwrap();
        assert!(seats.take(Some("2001:db8::ffff".parse().unwrap())).is_err());
        let local = seats.take(None).unwrap();
        let _also_local = seats.take(None).unwrap();
        drop((seat, local));
        let taken = seats.taken.lock().unwrap();
        assert_eq!((taken.all, taken.by_address.len()), (1, 0));
    }
}
