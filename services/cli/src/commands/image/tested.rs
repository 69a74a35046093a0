//! `kiln image tests`

use std::path::Path;

use kiln_api::builder::{Build, GetBuildRequest, TestResult};
use kiln_model::name::BuildId;
use quick_junit::{NonSuccessKind, Report, TestCase, TestCaseStatus, TestSuite};
use serde_json::json;

use crate::clients::Services;
use crate::failure::{Code, During as _, Failure, Outcome};
use crate::json;
use crate::screen::{Screen, plain};
use crate::words::{build_state, duration, plural};

pub(super) async fn run(name: &str, junit: Option<&Path>, services: &Services, screen: Screen) -> Outcome {
    let build = find(name, services).await?;
    if let Some(path) = junit {
        let what = format!("writing {}", path.display());
        let text = report(&build).to_string().map_err(|error| Failure::failed(&what, error.to_string()))?;
        std::fs::write(path, text).during(&what)?;
    }
    screen.json(&json!({
        "build": build.id,
        "tests": build.tests.iter().map(|it| json::of("kiln.builder.v1.TestResult", it)).collect::<Outcome<Vec<_>>>()?,
    }))?;
    let failed = build.tests.iter().filter(|test| !test.passed).count();
    if build.tests.is_empty() {
        screen.line(format_args!("{} ({}): no tests were run", build.id, build_state(build.state())))?;
    } else {
        table(&build.tests, screen)?;
    }
    if failed > 0 {
        let what = format!("testing the image of {}", build.id);
        let why = format!("{failed} of {} failed", plural(build.tests.len(), "test"));
        return Err(Failure::failed(what, why).todo(format!("kiln why {}", build.id)));
    }
    screen.next(&[format!("kiln why {}", build.id)])
}

/// The build of that name; of a server its last one.
async fn find(name: &str, services: &Services) -> Outcome<Build> {
    let missing = || Failure::new(Code::NotFound, format!("there is no build {name}"), "");
    if name.parse::<BuildId>().is_ok() {
        let request = GetBuildRequest { build: name.to_owned() };
        let what = format!("looking up the build {name}");
        match services.builder().get_build(request).await {
            // A server can be called like one.
            Err(status) if status.code() == tonic::Code::NotFound => {}
            answer => return answer.during(what)?.into_inner().build.ok_or_else(missing),
        }
    }
    services.builds(name).await?.pop().ok_or_else(missing)
}

pub(crate) fn table(tests: &[TestResult], screen: Screen) -> Outcome {
    let row = |test: &TestResult| {
        let word = if test.passed { "passed" } else { "FAILED" };
        let time = format!("{:.1}s", duration(test.took.as_ref()).as_secs_f64());
        vec![plain(&test.name), plain(word), plain(time), plain(&test.detail)]
    };
    screen.table(&["TEST", "RESULT", "TIME", "FOUND"], tests.iter().map(row).collect())
}

/// As CI systems read it.
fn report(build: &Build) -> Report {
    let mut suite = TestSuite::new(build.id.as_str());
    for test in &build.tests {
        let status = if test.passed {
            TestCaseStatus::success()
        } else {
            let mut status = TestCaseStatus::non_success(NonSuccessKind::Failure);
            status.set_message(test.detail.as_str());
            status.set_description(test.detail.as_str());
            status
        };
        let mut case = TestCase::new(test.name.as_str(), status);
        case.set_classname(build.server.as_str()).set_time(duration(test.took.as_ref()));
        suite.add_test_case(case);
    }
    if build.tests.iter().any(|test| !test.passed) {
        suite.set_system_out(build.last_log.join("\n"));
    }
    let mut report = Report::new(build.server.as_str());
    report.add_test_suite(suite);
    report
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_says_what_failed_and_what_the_instance_wrote() {
        let test = |name: &str, passed, detail: &str| TestResult {
            name: name.to_owned(),
            passed,
            detail: detail.to_owned(),
            took: Some(prost_types::Duration { seconds: 0, nanos: 200_000_000 }),
        };
        let build = Build {
            id: "web-b7".to_owned(),
            server: "web".to_owned(),
            tests: vec![
                test("http :80/", false, "status 502, wanted <200> & \u{1}\"Hello\""),
                test("file /etc/motd", true, "/etc/motd is as wanted"),
            ],
            last_log: vec!["[error] ]]> no such file\u{1b}[0m".to_owned()],
            ..Build::default()
        };
        let text = report(&build).to_string().unwrap();
        insta::assert_snapshot!(text);
    }
}
