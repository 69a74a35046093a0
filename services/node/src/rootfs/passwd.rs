//! Users by name, from the image's own /etc/passwd and /etc/group.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::open_inside;
use crate::failure::Failure;

const LIMIT: u64 = 1 << 20;

/// Whom an instance's process runs as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) groups: Vec<u32>,
    pub(crate) home: String,
}

/// Finds `user`, `user:group`, by names or numbers; empty is root.
pub(super) fn look_up(root: &OwnedFd, user: &str) -> Result<User, Failure> {
    let what = || format!("looking up the image's user `{user}`");
    let read =
        |path: &str| read(root, path).map_err(|error| Failure::new(what(), format!("{path}: {error}")));
    find(&read("etc/passwd")?, &read("etc/group")?, user).map_err(|why| Failure::new(what(), why))
}

/// The name that a user id has inside.
pub(crate) fn name_of(root: &OwnedFd, uid: u32) -> Option<String> {
    let passwd = read(root, "etc/passwd").ok()?;
    let line = lines(&passwd).find(|fields| fields.get(2).and_then(|id| id.parse().ok()) == Some(uid))?;
    line.first().map(|name| (*name).to_owned())
}

fn read(root: &OwnedFd, path: &str) -> std::io::Result<String> {
    let file = match open_inside(root, path, OFlags::RDONLY | OFlags::NONBLOCK) {
        Ok(file) => File::from(file),
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(String::new()),
        Err(error) => return Err(error.into()),
    };
    let mut content = Vec::new();
    if file.metadata()?.is_file() {
        file.take(LIMIT).read_to_end(&mut content)?;
    }
    Ok(String::from_utf8_lossy(&content).into_owned())
}

fn lines(content: &str) -> impl Iterator<Item = Vec<&str>> {
    content.lines().map(|line| line.split(':').collect())
}

fn find(passwd: &str, group: &str, wanted: &str) -> Result<User, String> {
    let wanted = if wanted.is_empty() { "0" } else { wanted };
    let (user, wanted_group) = wanted.split_once(':').map_or((wanted, None), |(u, g)| (u, Some(g)));
    let number = |text: &&str| text.parse::<u32>().ok();
    let entry = lines(passwd).find(|fields| {
        let by_name = fields.first() == Some(&user);
        by_name || (number(&user).is_some() && fields.get(2).and_then(number) == number(&user))
    });
    let id = |n: usize| entry.as_ref().and_then(|fields| fields.get(n)).and_then(number);
    let uid = id(2)
        .or_else(|| number(&user))
        .ok_or_else(|| format!("/etc/passwd of the image has no user `{user}`; add it, or use a number"))?;
    let gid = match wanted_group {
        None => id(3).unwrap_or(0),
        Some(name) => lines(group)
            .find(|fields| fields.first() == Some(&name))
            .and_then(|fields| fields.get(2).and_then(number))
            .or_else(|| number(&name))
            .ok_or_else(|| {
                format!("/etc/group of the image has no group `{name}`; add it, or use a number")
            })?,
    };
    let name = entry.as_ref().and_then(|fields| fields.first()).copied().unwrap_or_default();
    // A group that is asked for by name replaces the user's own ones.
    let member = |fields: &Vec<&str>| {
        let members = fields.get(3).copied().unwrap_or_default();
        wanted_group.is_none() && !name.is_empty() && members.split(',').any(|member| member == name)
    };
    let groups = lines(group).filter(member).filter_map(|fields| fields.get(2).and_then(number)).collect();
    let home = entry.as_ref().and_then(|fields| fields.get(5)).copied().unwrap_or_default();
    let home = if home.starts_with('/') { home } else { "/" };
    Ok(User { uid, gid, groups, home: home.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nwww-data:x:33:33:www:/var/www:/bin/sh\nbroken\n";
    const GROUP: &str = "root:x:0:\nwww-data:x:33:\nlog:x:44:www-data,other\n";

    fn ids(user: &str) -> Result<(u32, u32, Vec<u32>), String> {
        find(PASSWD, GROUP, user).map(|user| (user.uid, user.gid, user.groups))
    }

    #[test]
    fn users_go_by_name_and_number() {
        assert_eq!(ids(""), Ok((0, 0, vec![])));
        assert_eq!(ids("root"), Ok((0, 0, vec![])));
        assert_eq!(ids("www-data"), Ok((33, 33, vec![44])));
        assert_eq!(ids("33"), Ok((33, 33, vec![44])));
        assert_eq!(ids("www-data:log"), Ok((33, 44, vec![])));
        assert_eq!(ids("1234"), Ok((1234, 0, vec![])));
        assert_eq!(ids("1234:99"), Ok((1234, 99, vec![])));
        assert_eq!(find(PASSWD, GROUP, "www-data").unwrap().home, "/var/www");
        assert!(ids("nobody").unwrap_err().contains("nobody"));
        assert!(ids("root:nobody").unwrap_err().contains("nobody"));
        assert!(ids("-1").is_err());
    }
}
