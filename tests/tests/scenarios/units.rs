//! Services that have no more rights than their units give them.

use std::path::Path;

use kiln_model::event::Service;
use kiln_tests::Result;
use kiln_tests::command::binary;
use kiln_tests::server::Web;
use kiln_tests::site::Site;
use kiln_tests::unit::Unit;
use rustix::thread::CapabilitySet;

fn unit(service: Service) -> Result<Unit> {
    Unit::of(&format!("kiln-{service}@.service"))
}

/// What the kernel says of a process, or of this one.
struct Held(String);

impl Held {
    fn of(process: &str) -> Result<Self> {
        let read = |name: &str| std::fs::read_to_string(Path::new("/proc").join(process).join(name));
        Ok(Self(read("status")? + &read("limits")?))
    }

    fn says(&self, field: &str) -> Result<&str> {
        let line = self.0.lines().find_map(|line| line.strip_prefix(field));
        Ok(line.ok_or_else(|| format!("no {field} in {}", self.0))?.trim())
    }

    fn capabilities(&self, set: &str) -> Result<CapabilitySet> {
        Ok(CapabilitySet::from_bits_retain(u64::from_str_radix(self.says(set)?, 16)?))
    }
}

/// An image is baked anew and comes out the same, its instances are launched, probed, replaced and retired.
#[tokio::test(flavor = "multi_thread")]
async fn every_service_does_its_work_with_the_rights_of_its_unit() -> Result<()> {
    let programs = tempfile::tempdir()?;
    // What it starts, it starts from where it lies itself.
    std::fs::copy(binary("kiln")?, programs.path().join("kiln"))?;
    for service in Service::ALL {
        let name = format!("kiln-{service}");
        unit(service)?.write_starter(&programs.path().join(&name), &binary(&name)?)?;
    }
    let web = Web::start(Site::up_from(programs.path(), "units")?).await?;
    let all = Held::of("self")?.capabilities("CapBnd:")?;
    for service in Service::ALL {
        let (unit, held) = (unit(service)?, Held::of(&web.site.pid(service.as_str())?.to_string())?);
        let (names, but) = unit.bounds()?;
        let named = names.iter().map(|name| CapabilitySet::from_name(name).ok_or(format!("CAP_{name}")));
        let named = named.collect::<std::result::Result<CapabilitySet, _>>()?;
        let given = if but { all - named } else { named };
        for set in ["CapBnd:", "CapPrm:", "CapEff:"] {
            assert_eq!(held.capabilities(set)?, given, "{service}: {set}");
        }
        let bound = unit.get("NoNewPrivileges") == Some("yes");
        assert_eq!(held.says("NoNewPrivs:")?, u8::from(bound).to_string(), "{service}");
        assert!(held.says("Max core file size")?.starts_with("0 "), "{service}");
    }

    let verified = web.site.kiln(&["build", "web", "--verify", "--wait"])?;
    assert!(verified.contains("same"), "on an empty layer cache:\n{verified}");
    let load = web.load();
    web.say("bounded")?;
    web.settled(2).await?;
    web.site.kiln(&["rollback", "web"])?;
    web.settled(1).await?;
    load.stop().await.unfailing(500)?;
    web.site.down()
}
