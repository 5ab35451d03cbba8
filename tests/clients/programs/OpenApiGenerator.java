// The client that openapi-generator generates for Java.

import java.io.File;
import java.math.BigDecimal;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.Map;
import org.openapitools.client.ApiClient;
import org.openapitools.client.ApiException;
import org.openapitools.client.api.TasksApi;
import org.openapitools.client.model.FieldFault;
import org.openapitools.client.model.Problem;
import org.openapitools.client.model.State;
import org.openapitools.client.model.UpscaleTask;

class OpenApiGenerator {
    public static void main(String[] arguments) throws Exception {
        ApiClient client = new ApiClient();
        client.updateBaseUri(System.getenv("GATEWAY_URL"));
        client.setRequestInterceptor(
            request -> request.header("Authorization", "Bearer " + System.getenv("GATEWAY_TOKEN")));
        TasksApi tasks = new TasksApi(client);
        File image = new File(arguments[0]);
        UpscaleTask submitted = submit(tasks, image, "\"java-generator\"", "{\"order\": \"4711\"}");
        UpscaleTask task = tasks.readTask(submitted.getId(), null, "wait").getUpscaleTask();
        if (task.getState() != State.SUCCEEDED) {
            throw new AssertionError(task);
        }
        File result = tasks.readArtifact(task.getId(), task.getArtifacts().get(0).getName(), null, null, null, null);
        Files.copy(result.toPath(), Path.of(arguments[1]));
        try {
            submit(tasks, image, null, "no JSON");
        } catch (ApiException error) {
            Problem problem = client.getObjectMapper().readValue(error.getResponseBody(), Problem.class);
            Map<String, Object> found = Map.of(
                "scale", task.getOptions().getScale(),
                "order", task.getMetadata().get("order"),
                "code", problem.getCode(),
                "fields", problem.getErrors().stream().map(FieldFault::getField).toList(),
                "types", tasks.listTasks(null, null, 100, null).getItems().stream()
                    .map(item -> item.getActualInstance().getClass().getSimpleName()).distinct().sorted().toList());
            System.out.println(client.getObjectMapper().writeValueAsString(found));
        }
    }

    private static UpscaleTask submit(TasksApi tasks, File image, String key, String metadata) throws ApiException {
        return tasks.submitUpscale(
            key, null, image, null, null, null, BigDecimal.valueOf(3), null, null, null, null, null, null, null, null,
            null, metadata, null);
    }
}
