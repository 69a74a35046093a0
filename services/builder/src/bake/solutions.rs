//! What apt solved, for as long as its package lists stay what they are: the same question of the same lists has the same
//! answer, and most commits change no package.

use std::fs;
use std::path::{Path, PathBuf};

use kiln_model::digest::Digest;
use kiln_model::lock::BUILDER_FORMAT;
use serde_json::json;

use super::ReleaseFile;
use super::apt::Solved;
use super::error::BakeError;
use super::whole;

pub(crate) struct Solutions {
    folder: PathBuf,
}

impl Solutions {
    /// Those of the lists that these release files were read with. Others of the same archives are forgotten.
    ///
    /// `configuration` is apt's, which says how it solves.
    pub(crate) fn open(
        apt: &Path,
        configuration: &str,
        release_files: &[ReleaseFile],
    ) -> Result<Self, BakeError> {
        let files: Vec<_> = release_files.iter().map(|file| json!([file.url, file.digest])).collect();
        let key = json!({"format": BUILDER_FORMAT, "configuration": configuration, "files": files});
        let key = digest(&key)?.hex();
        let all = apt.join("solutions");
        let folder = all.join(&key);
        fs::create_dir_all(&folder).map_err(BakeError::io("make folder", &folder))?;
        for other in fs::read_dir(&all).map_err(BakeError::io("list", &all))?.filter_map(Result::ok) {
            if other.file_name() != *key
                && let Err(error) = fs::remove_dir_all(other.path())
            {
                tracing::warn!(path = %other.path().display(), %error, "old solutions are left");
            }
        }
        Ok(Self { folder })
    }

    /// What was solved for `lists` on top of what `status` names, or what `solve` gives now.
    pub(crate) fn get_or(
        &self,
        lists: &[&[String]],
        status: Option<&Path>,
        solve: impl FnOnce() -> Result<Vec<Vec<Solved>>, BakeError>,
    ) -> Result<Vec<Vec<Solved>>, BakeError> {
        let status = status.map(Path::to_string_lossy);
        let path = self.folder.join(digest(&json!({"lists": lists, "status": status}))?.hex());
        // One that a crash has cut is as good as none.
        if let Some(known) = fs::read(&path).ok().and_then(|text| serde_json::from_slice(&text).ok()) {
            return Ok(known);
        }
        let solved = solve()?;
        // It costs time, not the plan.
        let kept =
            serde_json::to_vec(&solved).map_err(Into::into).and_then(|text| whole::write(&path, &[&text]));
        if let Err(error) = kept {
            tracing::warn!(path = %path.display(), %error, "what apt solved is not kept");
        }
        Ok(solved)
    }
}

fn digest(value: &serde_json::Value) -> Result<Digest, BakeError> {
    Digest::of_json(value).map_err(|e| BakeError::io("write the key of", "a solution")(e.into()))
}

#[cfg(test)]
mod tests {
    use kiln_model::lock::LockedPackage;

    use super::*;

    fn solved(name: &str) -> Vec<Vec<Solved>> {
        let package = LockedPackage {
            name: name.to_owned(),
            version: "1".to_owned(),
            architecture: "all".to_owned(),
            sha256: Digest::of(name.as_bytes()),
            size: 1,
        };
        vec![vec![Solved { package, url: format!("http://a.test/{name}.deb"), security: false }]]
    }

    #[test]
    fn a_solution_counts_for_one_question_of_the_same_lists() {
        let folder = tempfile::tempdir().unwrap();
        let configured = |configuration: &str, content: &str| {
            let file = ReleaseFile {
                url: "http://a.test/InRelease".to_owned(),
                digest: Digest::of(content.as_bytes()),
            };
            Solutions::open(folder.path(), configuration, &[file]).unwrap()
        };
        let at = |content: &str| configured("a", content);
        let never = || panic!("it is known");
        let (x, y) = (["x".to_owned()], ["y".to_owned()]);
        let (both, first): ([&[String]; 2], [&[String]; 1]) = ([&x, &y], [&x]);

        let one = at("1");
        assert_eq!(one.get_or(&both, None, || Ok(solved("a"))).unwrap(), solved("a"));
        assert_eq!(one.get_or(&both, None, never).unwrap(), solved("a"));
        assert_eq!(at("1").get_or(&both, None, never).unwrap(), solved("a"));
        // Another list, another order, another system to go on top of.
        assert_eq!(one.get_or(&first, None, || Ok(solved("b"))).unwrap(), solved("b"));
        assert_eq!(one.get_or(&[&y, &x], None, || Ok(solved("c"))).unwrap(), solved("c"));
        let status = Some(Path::new("/status"));
        assert_eq!(one.get_or(&both, status, || Ok(solved("d"))).unwrap(), solved("d"));
        let failed = || Err(BakeError::Cancelled);
        assert!(one.get_or(&[&y], None, failed).is_err());
        assert_eq!(
            one.get_or(&[&y], None, || Ok(solved("e"))).unwrap(),
            solved("e"),
            "a failure is not kept"
        );

        // Cut by a crash.
        for file in fs::read_dir(&one.folder).unwrap() {
            fs::write(file.unwrap().path(), "[[{").unwrap();
        }
        assert_eq!(one.get_or(&both, None, || Ok(solved("f"))).unwrap(), solved("f"));

        // Other lists.
        assert_eq!(at("2").get_or(&both, None, || Ok(solved("g"))).unwrap(), solved("g"));
        assert_eq!(configured("b", "2").get_or(&both, None, || Ok(solved("h"))).unwrap(), solved("h"));
        assert_eq!(fs::read_dir(folder.path().join("solutions")).unwrap().count(), 1);
    }
}
