//! Definitions that are taken, and many that are refused: each of `tests/bad` begins with what is to be said of it.

#![allow(clippy::expect_used, reason = "the helpers of tests may fail as tests do")]

use std::path::{Path, PathBuf};

use kiln_model::definition::{
    ArchivePlace, Definition, MAX_TEXT, Source, Step, WrongPath, parse, wrong_paths,
};
use proptest::prelude::*;
use proptest::sample::Index;

fn folder(name: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(name);
    let mut files: Vec<_> =
        std::fs::read_dir(folder).expect("list").map(|entry| entry.expect("entry").path()).collect();
    files.sort();
    files
}

#[test]
fn bad_definitions_are_refused_with_line_column_and_advice() {
    let files = folder("bad");
    assert!(files.len() >= 25, "only {} kinds of bad definitions", files.len());
    let mut wrong = String::new();
    for path in files {
        let content = std::fs::read(&path).expect("read");
        let text = String::from_utf8_lossy(&content);
        // `# line:column: message; help`, one line for each problem.
        let wanted: Vec<_> = text.lines().map_while(|line| line.strip_prefix("# ")).collect();
        let found = match parse(&content, "server.yaml") {
            Ok(_) => vec!["taken".to_owned()],
            Err(errors) => errors.problems().iter().map(ToString::to_string).collect(),
        };
        if wanted.is_empty() || found != wanted {
            wrong += &format!(
                "{}\n  found\n    # {}\n  wanted\n    # {}\n",
                path.display(),
                found.join("\n    # "),
                wanted.join("\n    # ")
            );
        }
    }
    assert!(wrong.is_empty(), "\n{wrong}");
}

fn good(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/good").join(name);
    std::fs::read_to_string(path).expect("read")
}

#[test]
fn a_definition_with_everything_is_taken() {
    let definition = parse(good("full.yaml").as_bytes(), "server.yaml").expect("a good definition");
    insta::assert_json_snapshot!(definition);
}

#[test]
fn a_definition_with_the_least_has_safe_defaults() {
    let definition = parse(good("least.yaml").as_bytes(), "server.yaml").expect("a good definition");
    insta::assert_json_snapshot!(definition);
}

#[test]
fn an_image_can_begin_with_an_archive_of_a_root_file_system() {
    let definition = parse(good("archive.yaml").as_bytes(), "server.yaml").expect("a good definition");
    let Source::Archive { place: ArchivePlace::Url { url, sha256 }, .. } = &definition.image.from else {
        panic!("{:?}", definition.image.from)
    };
    assert_eq!((url.as_str(), sha256.hex()), ("http://127.0.0.1:8000/root.tar.xz", "ab".repeat(32)));
    assert_eq!(definition.image.from.named_files(), ["keys/archive.gpg"]);
    let of_folder = good("archive.yaml").replace("http://127.0.0.1:8000/root.tar.xz", "./root/fs.tar");
    let of_folder = of_folder.replace(&format!("    sha256: {}\n", "ab".repeat(32)), "");
    let definition = parse(of_folder.as_bytes(), "server.yaml").expect("a good definition");
    assert_eq!(definition.image.from.named_files(), ["root/fs.tar", "keys/archive.gpg"]);
}

#[test]
fn an_image_can_begin_with_one_that_others_have_made() {
    let definition = parse(good("image.yaml").as_bytes(), "server.yaml").expect("a good definition");
    assert_eq!(definition.image.from.named_files(), ["images/base", "keys/archive.gpg"]);
    let of_registry = good("image.yaml").replace("oci:images/base:v1", "registry.example:5000/app");
    let definition = parse(of_registry.as_bytes(), "server.yaml").expect("a good definition");
    let Source::Image { place, .. } = &definition.image.from else { panic!("{:?}", definition.image.from) };
    assert_eq!(place.to_string(), "registry.example:5000/app:latest");
    assert_eq!(definition.image.from.named_files(), ["keys/archive.gpg"]);
}

#[test]
fn an_image_can_begin_with_what_a_containerfile_makes() {
    let definition = parse(good("containerfile.yaml").as_bytes(), "server.yaml").expect("a good definition");
    assert_eq!(definition.image.named_files(), ["app.conf", "app/Containerfile", "app"]);
    let Source::Containerfile(spec) = &definition.image.from else { panic!("{:?}", definition.image.from) };
    assert_eq!((spec.file_in_context(), spec.target.as_deref()), (Some("Containerfile"), Some("run")));
    assert_eq!(spec.secrets, ["npm-token", "pip-token"]);
    let alone = "name: app\nimage: { from: { containerfile: docker/Dockerfile }, command: [x] }";
    let definition = parse(alone.as_bytes(), "server.yaml").expect("a good definition");
    assert_eq!(definition.image.named_files(), ["docker/Dockerfile", "."]);
}

#[test]
fn an_alias_stands_for_its_anchor() {
    let definition = parse(good("aliases.yaml").as_bytes(), "server.yaml").expect("a good definition");
    assert_eq!(definition.run.env, definition.image.env);
    assert_eq!(definition.parent().map(ToString::to_string), Some("base".to_owned()));
    // A byte order mark, as some editors write one, is no part of the text.
    let marked = format!("\u{feff}{}", good("aliases.yaml"));
    assert_eq!(parse(marked.as_bytes(), "server.yaml").ok(), Some(definition));
}

#[test]
fn counts_are_bounded() {
    let with_steps = |steps: &str| {
        let text =
            format!("name: web\nimage:\n  from: {{ debian: bookworm }}\n  command: [a]\n  steps:\n{steps}");
        parse(text.as_bytes(), "server.yaml").map(|_| ()).map_err(|errors| errors.to_string())
    };
    assert_eq!(with_steps(&"    - run: \"true\"\n".repeat(64)), Ok(()));
    assert_eq!(
        with_steps(&"    - run: \"true\"\n".repeat(65)),
        Err("server.yaml:6:5: 65 steps are too many; wanted at most 64".to_owned())
    );
    let files = |count| format!("    - files:\n{}", "      - { src: a, dest: /a }\n".repeat(count));
    assert_eq!(with_steps(&(files(500) + &files(500))), Ok(()));
    assert_eq!(
        with_steps(&(files(500) + &files(501))),
        Err("server.yaml:508:9: 1001 files are too many; wanted at most 1000 in all steps; a directory counts as one"
            .to_owned())
    );
    let long = format!("{}# {}\n", good("least.yaml"), "x".repeat(MAX_TEXT));
    let errors = parse(long.as_bytes(), "server.yaml").expect_err("too long");
    assert!(errors.to_string().starts_with("server.yaml:1:1: this text has "), "{errors}");
}

#[test]
fn people_see_the_lines_and_programs_a_list() {
    let text = "name: web\nimage:\n  from: { debain: bookworm }\n  command: [nginx]\nrun: { replicas: 0 }\n";
    let errors = parse(text.as_bytes(), "web/server.yaml").expect_err("two problems");
    let mut drawn = String::new();
    let theme = miette::GraphicalTheme::unicode_nocolor();
    miette::GraphicalReportHandler::new_themed(theme)
        .with_width(90)
        .render_report(&mut drawn, &errors.report())
        .expect("drawn");
    insta::assert_snapshot!(drawn);
    let list = serde_json::to_value(&errors).expect("JSON");
    let wanted = serde_json::json!({
        "file": "web/server.yaml",
        "line": 3,
        "column": 11,
        "message": "unknown key `debain`",
        "help": "did you mean `debian`?",
    });
    assert_eq!((list.as_array().map(Vec::len), &list[0]), (Some(2), &wanted));
}

#[test]
fn paths_that_the_folder_lacks_are_shown_where_they_are_named() {
    let wrong = |path: &str| WrongPath {
        path: path.to_owned(),
        message: format!("`{path}` does not exist"),
        help: "put it into the folder".to_owned(),
    };
    let errors = wrong_paths(
        good("full.yaml").as_bytes(),
        "server.yaml",
        ["nginx.conf", "keys/archive.gpg", "site"].map(wrong).to_vec(),
    );
    assert_eq!(
        errors.to_string(),
        "server.yaml:8:104: `keys/archive.gpg` does not exist; put it into the folder\n\
         server.yaml:12:18: `site` does not exist; put it into the folder\n\
         server.yaml:13:18: `nginx.conf` does not exist; put it into the folder"
    );
    assert_eq!(errors.server().map(ToString::to_string), Some("web".to_owned()));
}

#[test]
fn what_is_wrong_still_says_whose_it_is() {
    let server =
        |text: &str| parse(text.as_bytes(), "server.yaml").map_err(|errors| errors.server().cloned());
    assert_eq!(server("name: web\nimage: {}"), Err("web".parse().ok()));
    assert_eq!(server("name: Web\nimage: {}"), Err(None));
    assert_eq!(server("name: [web\n"), Err(None));
}

/// Texts that would take minutes, or all memory, if they were unfolded.
#[test]
fn bombs_do_not_take_long() {
    let laughs = (0..40).fold("a0: &a0 [x, x]\n".to_owned(), |text, level| {
        let next = level + 1;
        text + &format!("a{next}: &a{next} [*a{level}, *a{level}, *a{level}]\n")
    });
    let bombs = [
        laughs,
        "[".repeat(200_000),
        "{a: ".repeat(60_000),
        "- ".repeat(100_000),
        "? ".repeat(100_000),
        "a: &a [*a]\n".to_owned(),
        format!("name: {}\n", "x".repeat(250_000)),
        format!("{}: 1\n", "x".repeat(250_000)),
        (0..15_000).map(|n| format!("k{n}: 1\n")).collect(),
        format!("{{{}}}", (0..9_000).map(|n| format!("k{n}: ,")).collect::<String>()),
        "k: 1\n".repeat(50_000),
        format!("name: \"{}\"", "\\u00e9".repeat(40_000)),
        format!("a: &a {}\nb: [{}]\n", "x".repeat(100_000), "*a, ".repeat(150)),
        format!("image: {{ steps: [{}] }}", "{ run: 1 }, ".repeat(5000)),
        "!".repeat(200_000),
        "\"".repeat(200_001),
        "%YAML 1.2\n---\n".repeat(10_000),
        "# x\n".repeat(60_000),
        "\u{85}\u{2028}".repeat(40_000),
    ];
    for bomb in bombs {
        let begin = std::time::Instant::now();
        let result = parse(bomb.as_bytes(), "server.yaml");
        let shown: String = bomb.chars().take(40).collect();
        assert!(result.is_err(), "{shown:?} was taken");
        // They take milliseconds; the bound leaves room for a busy machine.
        assert!(begin.elapsed().as_secs() < 5, "{shown:?} took {:?}", begin.elapsed());
    }
}

proptest! {
    #[test]
    fn any_bytes_are_taken_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = parse(&bytes, "server.yaml");
    }

    #[test]
    fn any_text_of_yaml_is_taken_or_refused(text in "([a-z]{1,3}|name|image|run|[-:,?&*!|>'\"%@` \n\\[\\]{}#~.0-9]){0,60}") {
        let _ = parse(text.as_bytes(), "server.yaml");
    }

    /// What is wrong lies in the text, is told in the order of the text, and has a message.
    #[test]
    fn a_changed_definition_is_taken_or_refused(
        changes in proptest::collection::vec((any::<Index>(), 0..8_usize, "[-:,?&*!|>'\"%@` \n\\[\\]{}#~.a-z0-9\\x00\u{e9}]{0,4}"), 1..5)
    ) {
        let mut text: Vec<char> = good("full.yaml").chars().collect();
        for (index, removed, added) in changes {
            let at = index.index(text.len());
            let end = text.len().min(at + removed);
            text.splice(at..end, added.chars());
        }
        let text: String = text.into_iter().collect();
        if let Err(errors) = parse(text.as_bytes(), "server.yaml") {
            prop_assert!(!errors.problems().is_empty());
            let mut last = (0, 0);
            for problem in errors.problems() {
                let place = (problem.line(), problem.column());
                prop_assert!(place >= last && place >= (1, 1), "{}", errors);
                prop_assert!(problem.line() <= text.lines().count() + 1, "{}", errors);
                prop_assert!(!problem.message().is_empty() && !problem.message().contains('\n'), "{}", errors);
                last = place;
            }
            let mut drawn = String::new();
            prop_assert!(miette::GraphicalReportHandler::new().render_report(&mut drawn, &errors.report()).is_ok());
        }
    }

    /// A definition that was taken can be stored and read again.
    #[test]
    fn a_definition_comes_back_from_its_document(replicas in 1..1000_u32, soak in 0..200_u32) {
        let text = format!("{}run: {{ replicas: {replicas}, rollout: {{ soak: {soak}s }} }}\n", good("least.yaml"));
        let definition = parse(text.as_bytes(), "server.yaml").map_err(|errors| TestCaseError::fail(errors.to_string()))?;
        let document = serde_json::to_string(&definition).map_err(|error| TestCaseError::fail(error.to_string()))?;
        prop_assert_eq!(serde_json::from_str::<Definition>(&document).ok(), Some(definition));
    }
}

/// Kept by a version that knew of nothing to reach, and read by it again where there is nothing.
#[test]
fn a_script_alone_is_kept_as_a_text() {
    let step: Step = serde_json::from_str(r#"{"run": "nginx -t"}"#).expect("an earlier document");
    let Step::Run(run) = &step else { panic!("{step:?}") };
    assert!(run.script == "nginx -t" && run.reach.is_nothing());
    assert_eq!(serde_json::to_string(&step).expect("write"), r#"{"run":"nginx -t"}"#);
    let reaching = parse(good("full.yaml").as_bytes(), "server.yaml").expect("a good definition");
    let kept = serde_json::to_string(&reaching).expect("write");
    assert_eq!(serde_json::from_str::<Definition>(&kept).expect("read"), reaching);
}
