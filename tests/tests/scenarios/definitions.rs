//! Bad definitions are refused with line and column, and nothing changes.

use std::path::Path;

use kiln_tests::Result;
use kiln_tests::command::both;
use kiln_tests::repo::Repo;
use kiln_tests::site::Site;

#[tokio::test(flavor = "multi_thread")]
async fn bad_definitions_are_refused_with_line_and_column() -> Result<()> {
    let site = Site::up("definitions")?;
    let folder = tempfile::tempdir()?;
    let bad = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/model/tests/bad");
    let mut kinds = 0;
    for entry in std::fs::read_dir(&bad)? {
        let path = entry?.path();
        if path.extension().is_none_or(|extension| extension != "yaml") {
            continue;
        }
        kinds += 1;
        let name = path.file_stem().ok_or("a name")?.to_string_lossy().into_owned();
        let definition = folder.path().join(&name);
        std::fs::create_dir(&definition)?;
        std::fs::copy(&path, definition.join("server.yaml"))?;
        for arguments in
            [["lint", definition.to_str().ok_or("a text")?], ["apply", definition.to_str().ok_or("a text")?]]
        {
            let output = site.try_kiln(&arguments)?;
            let text = both(&output);
            assert_eq!(output.status.code(), Some(64), "{name}: {arguments:?}: {text}");
            let located = text.split("server.yaml:").skip(1).any(|rest| {
                let mut numbers = rest.split(|c: char| !c.is_ascii_digit());
                let number =
                    |part: Option<&str>| part.is_some_and(|part| part.parse::<u32>().is_ok_and(|n| n > 0));
                number(numbers.next()) && number(numbers.next())
            });
            assert!(located, "{name}: no line and column in\n{text}");
        }
    }
    assert!(kinds >= 20, "{kinds} kinds");
    let servers =
        site.builder().list_servers(kiln_api::builder::ListServersRequest::default()).await?.into_inner();
    assert!(servers.servers.is_empty(), "nothing changed: {:?}", servers.servers);

    // From Git: refused as a whole, and shown.
    let repo = Repo::with(&folder.path().join("repo"), "bad", &folder.path().join("unknown-key"))?;
    let output = site.try_kiln(&["apply", &repo.url(), "--branch", "main"])?;
    assert_eq!(output.status.code(), Some(64), "{}", both(&output));
    site.down()
}
