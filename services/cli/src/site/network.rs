//! Addresses and ports of this machine that nobody has.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::fs::OpenOptionsExt as _;
use std::time::{Duration, Instant};

use kiln_service::config::Site;
use rand::Rng as _;
use rand::seq::SliceRandom as _;

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use crate::failure::{Code, During as _, Failure, Outcome};
use crate::screen::Screen;

/// 10.64.0.0 to 10.95.255.0: clear of what container engines and clusters take by default (10.96.0.0/12, 10.42.0.0/15,
/// 10.244.0.0/16). Two sites that are made at the same moment meet with a chance of 1 in 8192.
const SECOND: std::ops::Range<u8> = 64..96;

/// Ports below those that the kernel gives to outgoing connections, so that a service finds its port free again after
/// a restart.
const PORTS: std::ops::Range<u16> = 20_000..32_000;

/// Empty, for root alone, and of no site.
const TURN: &str = "/run/kiln-up.lock";
const LOOK: Duration = Duration::from_millis(20);

/// A network that this machine reaches by a route of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Route {
    network: u32,
    mask: u32,
}

impl Route {
    /// To a /24.
    fn to(network: Ipv4Addr) -> Self {
        Self { network: network.to_bits(), mask: 0xffff_ff00 }
    }

    fn covers(self, other: Self) -> bool {
        let mask = self.mask & other.mask;
        self.network & mask == other.network & mask
    }
}

/// One new site at a time chooses ports and a network on this machine, and has its turn until its services hold them:
/// before that, nothing shows another one that they are taken.
pub(crate) async fn turn(limit: Instant, screen: Screen) -> Outcome<File> {
    let what = format!("waiting for another new site to come up (lock {TURN})");
    let mut told = false;
    let lock =
        File::options().create(true).write(true).truncate(false).mode(0o600).open(TURN).during(&what)?;
    loop {
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(lock),
            Err(Errno::WOULDBLOCK) if Instant::now() < limit => {
                if !std::mem::replace(&mut told, true) {
                    screen.progress(&what);
                }
                tokio::time::sleep(LOOK).await;
            }
            Err(error) => return Err(Failure::new(Code::Unavailable, what, error).todo("kiln up again")),
        }
    }
}

/// Ports that sites have in their settings, whether they run or not.
pub(crate) fn ports(sites: &[Site]) -> BTreeSet<u16> {
    let brokers = sites.iter().flat_map(|site| site.nats_url.split(',').filter_map(port_of));
    let own = sites.iter().flat_map(|site| site.metrics.values().chain(site.listen.values()));
    brokers.chain(own.map(SocketAddr::port)).collect()
}

pub(crate) fn port_of(url: &str) -> Option<u16> {
    url.trim_end_matches('/').rsplit(':').next()?.parse().ok()
}

/// A /24 that no route of this machine overlaps, and that no other site has.
pub(crate) fn free_subnet(others: &[Site]) -> Outcome<String> {
    let mut routes = routes(None);
    routes.extend(others.iter().map(|site| Route::to(site.subnet.network())));
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
    let wanted = Route::to(network);
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

/// Different loopback ports on which nobody listens, none of those that are taken.
pub(crate) fn free_ports(count: usize, taken: &BTreeSet<u16>) -> Outcome<Vec<u16>> {
    let mut candidates: Vec<u16> = PORTS.filter(|port| !taken.contains(port)).collect();
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
    use crate::screen::Format;

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
        let mut ports = free_ports(5, &BTreeSet::new()).unwrap();
        ports.sort_unstable();
        ports.dedup();
        assert_eq!(ports.len(), 5);
    }

    #[test]
    fn what_another_site_has_in_its_settings_is_taken() {
        let all_but_one: BTreeSet<u16> = PORTS.filter(|port| *port != 30_001).collect();
        // Nobody has to listen on them.
        assert!(free_ports(2, &all_but_one).is_err());
        assert_eq!(port_of("tls://127.0.0.1:21907"), Some(21907));
        assert_eq!(port_of("nats://127.0.0.1:21907/"), Some(21907));
        assert_eq!(port_of("nats://localhost"), None);
    }

    #[tokio::test]
    async fn one_new_site_has_its_turn_at_a_time() {
        let long = Instant::now() + Duration::from_secs(60);
        let screen = Screen::new(Format::Json, true);
        let first = turn(long, screen).await.unwrap();
        assert!(turn(Instant::now(), screen).await.is_err());
        drop(first);
        turn(long, screen).await.unwrap();
    }
}
