//! The same playbook on a base that is there: by Kiln, against `ansible-playbook` into a working container of buildah, which
//! is committed.

use std::path::Path;
use std::time::Instant;

use kiln_tests::Result;
use kiln_tests::command::run as run_command;

use crate::Pairs;
use crate::bench::Bench;
use crate::buildah::{BASE, Buildah, MADE};

const DEFINITION: &str = "\
apiVersion: kiln/v1
name: web
image:
  from: { debian: bookworm }
  steps:
    - ansible: { playbook: ansible/site.yml, vars: { greeting: Hello 0 } }
  command: [sleep, infinity]
run:
  replicas: 1
";
const PLAYBOOK: &str = "\
- hosts: all
  tasks:
    - name: the server
      apt: { name: nginx-light, update_cache: true, install_recommends: false }
    - name: its user
      user: { name: deploy, system: true, shell: /usr/sbin/nologin, home: /srv/deploy }
    - name: its page
      template: { src: index.html.j2, dest: /var/www/html/index.html, owner: deploy, mode: '0640' }
    - name: its workers
      lineinfile: { path: /etc/nginx/nginx.conf, regexp: '^worker_processes', line: 'worker_processes 2;' }
    - name: its folder
      file: { path: /srv/deploy/run, state: directory, owner: deploy, mode: '0750' }
";
const TEMPLATE: &str = "{{ greeting }} from {{ ansible_distribution_release }}\n";
/// What Ansible needs of a machine, which Kiln brings and takes away again: theirs has it from the beginning.
const OF_PEER: &str = "{ packages: [python3-apt] }";
const CONTAINER: &str = "bench";

/// Theirs begins with the same Debian, and with what forbids packages to start services, as images of containers do.
pub(crate) async fn run() -> Result<Pairs> {
    let files = [("ansible/site.yml", PLAYBOOK), ("ansible/index.html.j2", TEMPLATE)];
    let mut bench = Bench::start("bench-ansible", DEFINITION, &files).await?;
    let buildah = Buildah::new(&bench.path("buildah"))?;
    prepare(&bench, &buildah).await?;
    let playbook = bench.repo.path().join("web/ansible/site.yml");
    let mut pairs = Pairs::new("ansible-playbook into buildah");
    let mut said = "Hello 0".to_owned();
    // The first round fills caches and is not counted.
    for number in 0..=5 {
        let greeting = format!("Hello {number} again");
        bench.repo.replace("web/server.yaml", &said, &greeting)?;
        bench.repo.commit("Greet otherwise")?;
        said.clone_from(&greeting);
        let kiln = bench.bake().await?;
        let began = Instant::now();
        play(&buildah, &playbook, &greeting)?;
        if number > 0 {
            pairs.add(kiln, began.elapsed());
        }
    }
    bench.site.down()?;
    Ok(pairs)
}

async fn prepare(bench: &Bench, buildah: &Buildah) -> Result<()> {
    let base = bench.bake_base(OF_PEER).await?;
    buildah.take(&bench.site.export(&base, bench.folder.path())?)?;
    let context = bench.path("context");
    std::fs::create_dir(&context)?;
    let archives = bench.put_archives(&context)?;
    let file = format!(
        "FROM {BASE}\n{archives}RUN printf '#!/bin/sh\\nexit 101\\n' >/usr/sbin/policy-rc.d && chmod 755 /usr/sbin/policy-rc.d\n"
    );
    std::fs::write(context.join("Containerfile"), file)?;
    buildah.build(&context)
}

fn play(buildah: &Buildah, playbook: &Path, greeting: &str) -> Result<()> {
    let of_buildah = |arguments: &[&str]| run_command(buildah.command("buildah").args(arguments));
    of_buildah(&["from", "--pull-never", "--name", CONTAINER, MADE])?;
    let mut play = buildah.command("ansible-playbook");
    play.args(["--inventory", &format!("{CONTAINER},"), "--connection", "containers.podman.buildah"]);
    play.arg("--extra-vars").arg(serde_json::json!({ "greeting": greeting }).to_string()).arg(playbook);
    run_command(&mut play)?;
    of_buildah(&["commit", "--quiet", CONTAINER, "localhost/played"])?;
    of_buildah(&["rm", CONTAINER])?;
    Ok(())
}
