//! Addresses and ports of this machine that nobody has.

use std::fs;
use std::net::{Ipv4Addr, TcpListener};

use rand::Rng as _;
use rand::seq::SliceRandom as _;

use crate::failure::{Failure, Outcome};

/// 10.64.0.0 to 10.95.255.0: clear of what container engines and clusters take by default (10.96.0.0/12, 10.42.0.0/15,
/// 10.244.0.0/16). Two sites that are made at the same moment meet with a chance of 1 in 8192.
const SECOND: std::ops::Range<u8> = 64..96;

/// Ports below those that the kernel gives to outgoing connections, so that a service finds its port free again after
/// a restart.
const PORTS: std::ops::Range<u16> = 20_000..32_000;

/// A network that this machine reaches by a route of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Route {
    network: u32,
    mask: u32,
}

impl Route {
    fn covers(self, other: Self) -> bool {
        let mask = self.mask & other.mask;
        self.network & mask == other.network & mask
    }
}

/// A /24 that no route of this machine overlaps.
pub(crate) fn free_subnet() -> Outcome<String> {
    let routes = routes(None);
    let mut random = rand::rng();
    for _ in 0..1000 {
        let network = Ipv4Addr::new(10, random.random_range(SECOND), random.random(), 0);
        if !is_taken(network, &routes) {
            return Ok(format!("{network}/24"));
        }
    }
    Err(Failure::failed(
        "choosing a network for the instances",
        "routes of this machine cover all of 10.64.0.0/11",
    )
    .todo("name a free one: kiln up --config subnet=192.168.77.0/24"))
}

/// Whether routes that lead elsewhere than to `bridge` overlap a /24.
pub(crate) fn is_routed_elsewhere(network: Ipv4Addr, bridge: &str) -> bool {
    is_taken(network, &routes(Some(bridge)))
}

fn is_taken(network: Ipv4Addr, routes: &[Route]) -> bool {
    let wanted = Route { network: network.to_bits(), mask: 0xffff_ff00 };
    routes.iter().any(|route| route.covers(wanted))
}

/// All but the default route; where they can't be read there is nothing to avoid.
fn routes(but: Option<&str>) -> Vec<Route> {
    parse_routes(&fs::read_to_string("/proc/net/route").unwrap_or_default(), but)
}

fn parse_routes(table: &str, but: Option<&str>) -> Vec<Route> {
    // The kernel prints addresses as numbers in the machine's byte order.
    let address =
        |text: &str| u32::from_str_radix(text, 16).ok().map(|raw| u32::from_be_bytes(raw.to_ne_bytes()));
    let parse = |line: &str| {
        let fields: Vec<_> = line.split_whitespace().collect();
        if fields.first().copied() == but {
            return None;
        }
        Some(Route { network: address(fields.get(1)?)?, mask: address(fields.get(7)?)? })
    };
    table.lines().skip(1).filter_map(parse).filter(|route| route.mask != 0).collect()
}

/// Different loopback ports on which nobody listens.
pub(crate) fn free_ports(count: usize) -> Outcome<Vec<u16>> {
    let mut candidates: Vec<u16> = PORTS.collect();
    candidates.shuffle(&mut rand::rng());
    let free = candidates.into_iter().filter(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).is_ok());
    let found: Vec<u16> = free.take(count).collect();
    if found.len() == count {
        Ok(found)
    } else {
        Err(Failure::failed("choosing ports on 127.0.0.1", "none is free between 20000 and 31999"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As a little-endian machine prints it: default, 192.0.2.0/24, 10.0.0.0/8, 10.77.3.0/24 on a bridge.
    const TABLE: &str = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\n\
        eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\n\
        eth0\t000200C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\n\
        kiln-0a1b2c\t00034D0A\t00000000\t0001\t0\t0\t0\t00FFFFFF\n";

    #[test]
    #[cfg(target_endian = "little")]
    fn a_route_takes_what_it_overlaps() {
        let routes = parse_routes(TABLE, None);
        assert_eq!(routes.len(), 2);
        assert!(is_taken(Ipv4Addr::new(192, 0, 2, 0), &routes));
        assert!(is_taken(Ipv4Addr::new(10, 77, 3, 0), &routes));
        assert!(!is_taken(Ipv4Addr::new(10, 77, 4, 0), &routes));
        let wide = parse_routes(
            &TABLE.replace("000200C0\t00000000", "0000000A\t00000000").replace("00FFFFFF", "000000FF"),
            None,
        );
        assert!(is_taken(Ipv4Addr::new(10, 70, 9, 0), &wide));
        // A site's own bridge is no obstacle to itself.
        assert!(!is_taken(Ipv4Addr::new(10, 77, 3, 0), &parse_routes(TABLE, Some("kiln-0a1b2c"))));
    }

    #[test]
    fn ports_differ() {
        let mut ports = free_ports(5).unwrap();
        ports.sort_unstable();
        ports.dedup();
        assert_eq!(ports.len(), 5);
    }
}
