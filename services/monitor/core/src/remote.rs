//! What may be asked of a Git remote, and what its answer says.

/// Why a remote is not asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error(
        "the address of the repository is empty, longer than {MAX_URL} bytes, or holds a control character"
    )]
    Text,
    #[error("the address begins with `-`, or its host does: it would be taken for an option")]
    Option,
    #[error("the address is none of https, http, ssh, git, file, `user@host:path`, or an absolute path")]
    Transport,
    #[error("`{0}` is not the name of a branch")]
    Branch(String),
}

const MAX_URL: usize = 2048;

/// Refuses addresses that would run a program (`ext::…`), be taken for an option, or name no place.
///
/// # Errors
/// [`Refused`], which says which of these.
pub fn check_url(url: &str) -> Result<(), Refused> {
    if url.is_empty() || url.len() > MAX_URL || url.chars().any(char::is_control) {
        return Err(Refused::Text);
    }
    if url.starts_with('-') {
        return Err(Refused::Option);
    }
    if url.starts_with('/') {
        return Ok(());
    }
    let authority = if let Some((scheme, rest)) = url.split_once("://") {
        if !matches!(scheme, "https" | "http" | "ssh" | "git" | "file") {
            return Err(Refused::Transport);
        }
        rest.split('/').next().unwrap_or_default()
    } else if url.contains("::") {
        // `helper::address` runs `git-remote-helper`.
        return Err(Refused::Transport);
    } else {
        match url.split_once(':') {
            Some((host, _)) if !host.is_empty() && !host.contains('/') => host,
            _ => return Err(Refused::Transport),
        }
    };
    let host = authority.rsplit('@').next().unwrap_or_default();
    if host.starts_with('-') || authority.starts_with('-') {
        return Err(Refused::Option);
    }
    Ok(())
}

/// The full name of a branch's ref.
///
/// # Errors
/// [`Refused::Branch`] for what git-check-ref-format(1) would refuse, which includes every pattern.
pub fn branch_ref(branch: &str) -> Result<String, Refused> {
    let bad_part = |part: &str| part.is_empty() || part.starts_with('.') || part.ends_with(".lock");
    let bad_char = |c: char| c.is_control() || matches!(c, ' ' | '~' | '^' | ':' | '?' | '*' | '[' | '\\');
    if branch.len() > 255
        || branch.starts_with('-')
        || branch.ends_with('.')
        || branch.contains("..")
        || branch.contains("@{")
        || branch == "@"
        || branch.chars().any(bad_char)
        || branch.split('/').any(bad_part)
    {
        return Err(Refused::Branch(branch.chars().filter(|c| !c.is_control()).take(80).collect()));
    }
    Ok(format!("refs/heads/{branch}"))
}

/// The commit that `git ls-remote` names for exactly this ref.
pub fn head(output: &str, reference: &str) -> Option<String> {
    output.lines().find_map(|line| {
        let (commit, name) = line.split_once('\t')?;
        let hex = commit.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        (name == reference && hex && matches!(commit.len(), 40 | 64)).then(|| commit.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_places_are_asked() {
        for good in [
            "https://git.example/team/servers.git",
            "http://git.example/x",
            "ssh://git@git.example:2222/x",
            "git@git.example:team/servers.git",
            "git://git.example/x",
            "file:///srv/git/servers",
            "/srv/git/servers",
        ] {
            assert_eq!(check_url(good), Ok(()), "{good}");
        }
        for (bad, why) in [
            ("", Refused::Text),
            ("https://git.example/\nx", Refused::Text),
            (&"a".repeat(2049), Refused::Text),
            ("--upload-pack=touch /tmp/x", Refused::Option),
            ("-oProxyCommand=touch /tmp/x", Refused::Option),
            ("ssh://-oProxyCommand=touch%20x/y", Refused::Option),
            ("ssh://git@-oProxyCommand=x/y", Refused::Option),
            ("git@-oProxyCommand=x:y", Refused::Option),
            ("ext::sh -c touch% /tmp/x", Refused::Transport),
            ("fd::17", Refused::Transport),
            ("ftp://git.example/x", Refused::Transport),
            ("servers", Refused::Transport),
            ("../servers", Refused::Transport),
            ("./a:b", Refused::Transport),
        ] {
            assert_eq!(check_url(bad), Err(why), "{bad}");
        }
    }

    #[test]
    fn a_branch_is_one_name_and_no_pattern() {
        for good in ["main", "release/1.0", "a-b_c", "täst"] {
            assert_eq!(branch_ref(good), Ok(format!("refs/heads/{good}")));
        }
        for bad in
            ["", "*", "ma?n", "-x", "a..b", "a/", "/a", ".a", "a/.b", "a.lock", "@", "a@{1}", "a b", "a\nb"]
        {
            assert!(branch_ref(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn the_head_is_that_of_the_very_branch() {
        let one = "1".repeat(40);
        let two = "2".repeat(64);
        let output = format!("{one}\trefs/heads/x/refs/heads/main\n{two}\trefs/heads/main\n");
        assert_eq!(head(&output, "refs/heads/main"), Some(two));
        for none in
            ["", "fatal: no", "zz\trefs/heads/main", "12\trefs/heads/main", &format!("{one} refs/heads/main")]
        {
            assert_eq!(head(none, "refs/heads/main"), None, "{none}");
        }
    }
}
